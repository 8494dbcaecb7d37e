//! Who is who in a cluster: its certificate authority, the identities it issues, and the TLS settings made of them.
//!
//! One CA a cluster. Everybody has one certificate, good for calling and for being called, whose SAN URI says who it is:
//! `drover://<cluster>/<role>/<name>`. TLS checks the chain and the DNS name of whom one calls; the URI is read after
//! the handshake, by [`peer_identity`] or [`identity_of`], and what a role may do is decided by the service that is called.
//!
//! ```text
//! ClusterCa --issue_to--> ca.pem, <name>.pem, <name>.key
//!                              | Credentials::load: key's mode, chain, cluster
//!                              v
//!             tonic_server / tonic_client / rustls_server / rustls_client
//! ```
//!
//! It does not revoke: a certificate is good until it expires, or until the cluster gets a new CA.

mod ca;
mod credentials;
mod error;
mod files;
mod identity;

pub use ca::{ClusterCa, Issued};
pub use credentials::{Credentials, install_provider, peer_identity, tls_fault};
pub use error::PkiError;
pub use files::TlsFiles;
pub use identity::{Identity, Role, controller_dns, host_dns, identity_of};
pub use rustls_pki_types::CertificateDer;
