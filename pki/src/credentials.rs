//! A party's loaded certificate and key, and the TLS settings made of them.

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use drover_proto::{Code, Fault};
use rustls::server::WebPkiClientVerifier;
use rustls::{AlertDescription, CertificateError, CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tonic::transport::{Certificate, ClientTlsConfig, ServerTlsConfig};

use crate::{Identity, PkiError, TlsFiles, files, identity_of};

/// A peer that has not finished its handshake by then is dropped, so that silent ones cannot pile up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Deepest chain of error sources that is searched.
const SOURCES_MAX: usize = 16;

/// Makes ring the process's rustls provider, with AES-128 before AES-256: both are beyond attack, and the guest's memory that goes
/// through it costs a fifth less. May be called any number of times.
pub fn install_provider() {
    let mut provider = rustls::crypto::ring::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    // An error only says that a provider was installed before: every part of Drover installs this one.
    let _ = provider.install_default();
}

/// A party's certificate and key with its cluster's CA, checked.
pub struct Credentials {
    identity: Identity,
    ca_pem: Vec<u8>,
    cert_pem: Vec<u8>,
    key_pem: Vec<u8>,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Loads and checks: the key is its owner's alone and belongs to the certificate, the certificate was issued by the CA, is
    /// valid now and of the cluster `expected_cluster`.
    pub fn load(files: &TlsFiles, expected_cluster: &str) -> Result<Self, PkiError> {
        let opened = [
            files::open(&files.ca)?,
            files::open(&files.cert)?,
            files::open(&files.key)?,
        ];
        Self::read(files, &opened, expected_cluster)
    }

    /// [`Credentials::load`] of files that are open already: CA, certificate and key of `files`, which names them.
    pub fn read(
        files: &TlsFiles,
        [ca, cert, key]: &[File; 3],
        expected_cluster: &str,
    ) -> Result<Self, PkiError> {
        install_provider();
        let ca_pem = files::read(&files.ca, ca)?;
        let cert_pem = files::read(&files.cert, cert)?;
        let key_pem = files::read_private(&files.key, key)?;
        let roots = Arc::new(roots(&files.ca, &certificates(&files.ca, &ca_pem)?)?);
        let chain = certificates(&files.cert, &cert_pem)?;
        let key = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|error| PkiError::Pem {
            path: files.key.clone(),
            problem: format!("no private key in PEM form: {error}"),
        })?;
        let identity = identity_of(&chain, expected_cluster)
            .map_err(|error| PkiError::Denied(format!("{}: {error}", files.cert.display())))?;
        let verifier = WebPkiClientVerifier::builder(roots.clone())
            .build()
            .map_err(|error| PkiError::Certificate(format!("{}: {error}", files.ca.display())))?;
        verifier
            .verify_client_cert(&chain[0], &chain[1..], UnixTime::now())
            .map_err(|error| {
                PkiError::Denied(format!(
                    "{}: {error}; want a certificate that {} issued and that is valid now",
                    files.cert.display(),
                    files.ca.display()
                ))
            })?;
        let mismatch = |error: rustls::Error| PkiError::Pem {
            path: files.key.clone(),
            problem: format!("does not go with {}: {error}", files.cert.display()),
        };
        let server = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(mismatch)?;
        let client = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(mismatch)?;
        Ok(Self {
            identity,
            ca_pem,
            cert_pem,
            key_pem,
            server: Arc::new(server),
            client: Arc::new(client),
        })
    }

    /// Who these credentials are of.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Settings of a gRPC server that requires a client certificate of this cluster's CA.
    pub fn tonic_server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new()
            .identity(self.tonic_identity())
            .client_ca_root(Certificate::from_pem(&self.ca_pem))
            .timeout(HANDSHAKE_TIMEOUT)
    }

    /// Settings of a gRPC client that calls `dns_name` ([`crate::controller_dns`], [`crate::host_dns`]).
    pub fn tonic_client(&self, dns_name: &str) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .domain_name(dns_name)
            .ca_certificate(Certificate::from_pem(&self.ca_pem))
            .identity(self.tonic_identity())
            .timeout(HANDSHAKE_TIMEOUT)
    }

    /// TLS 1.3 settings of a server outside gRPC; client certificates of this cluster's CA are required.
    pub fn rustls_server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// TLS 1.3 settings of a client outside gRPC.
    pub fn rustls_client(&self) -> Arc<ClientConfig> {
        self.client.clone()
    }

    fn tonic_identity(&self) -> tonic::transport::Identity {
        tonic::transport::Identity::from_pem(&self.cert_pem, &self.key_pem)
    }
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let bad = |problem: String| PkiError::Pem {
        path: path.to_owned(),
        problem,
    };
    let chain = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| bad(format!("no certificate in PEM form: {error}")))?;
    if chain.is_empty() {
        return Err(bad("no certificate in PEM form".to_owned()));
    }
    Ok(chain)
}

fn roots(path: &Path, certificates: &[CertificateDer<'static>]) -> Result<RootCertStore, PkiError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone()).map_err(|error| PkiError::Pem {
            path: path.to_owned(),
            problem: format!("no CA certificate: {error}"),
        })?;
    }
    Ok(roots)
}

/// Who sent `req`, of the cluster `cluster`; anybody else gets the fault `denied`, which says what was expected.
pub fn peer_identity<T>(req: &tonic::Request<T>, cluster: &str) -> Result<Identity, tonic::Status> {
    let chain = req.peer_certs().unwrap_or_default();
    identity_of(&chain, cluster).map_err(|error| Fault::from(error).into())
}

/// The fault `denied` when `error`, or what caused it, is a failed TLS handshake over certificates; `None` for every other
/// failure. Transports hide such a refusal deep in a chain that says "transport error": this is what to tell a person.
pub fn tls_fault(error: &(dyn Error + 'static)) -> Option<Fault> {
    let mut next = Some(error);
    for _ in 0..SOURCES_MAX {
        let error = next?;
        if let Some(fault) = error.downcast_ref::<rustls::Error>().and_then(handshake_fault) {
            return Some(fault);
        }
        // An io::Error keeps what it wraps out of its sources.
        let inner = error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}

fn handshake_fault(error: &rustls::Error) -> Option<Fault> {
    use rustls::Error::{AlertReceived, InvalidCertificate, NoCertificatesPresented};
    let what = match error {
        InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "the server's certificate was not issued by this cluster's CA: it is of another cluster"
                .to_owned()
        }
        InvalidCertificate(why) => format!("the server's certificate is not the one expected: {why}"),
        AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            "the server refused our certificate: its CA did not issue it; want one of the server's cluster"
                .to_owned()
        }
        AlertReceived(
            alert @ (AlertDescription::BadCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired
            | AlertDescription::AccessDenied
            | AlertDescription::UnsupportedCertificate),
        ) => format!("the server refused our certificate: {alert:?}"),
        NoCertificatesPresented => "the peer presented no certificate: want one of this cluster".to_owned(),
        _ => return None,
    };
    Some(Fault::new(Code::Denied, what))
}
