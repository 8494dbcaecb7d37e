//! The cluster's certificate authority: made once, kept by whoever sets the cluster up.

use std::fs;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::{Duration, OffsetDateTime};

use crate::identity::{check_name, uri_of};
use crate::{Identity, PkiError, Role, TlsFiles, controller_dns, files, host_dns};

/// A CA outlives the machines it is made for.
const CA_VALID: Duration = Duration::days(3650);
/// A party's certificate; issue it again before.
const PARTY_VALID: Duration = Duration::days(825);
/// Clocks of a cluster's machines may be apart by this much.
const CLOCK_SKEW: Duration = Duration::hours(1);
/// Mode of certificates.
const PUBLIC: u32 = 0o644;
/// Mode of private keys.
const PRIVATE: u32 = 0o600;

/// A cluster's CA with its key.
pub struct ClusterCa {
    cluster: String,
    cert_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A fresh certificate with its key, both PEM.
pub struct Issued {
    /// The certificate.
    pub cert_pem: String,
    /// Its private key (PKCS #8).
    pub key_pem: String,
}

impl ClusterCa {
    /// Makes a CA with a new key for the cluster `cluster_id`.
    pub fn create(cluster_id: &str) -> Result<Self, PkiError> {
        check_name("cluster", cluster_id)?;
        let key = KeyPair::generate()?;
        let mut params = params_for(&format!("Drover cluster {cluster_id}"), CA_VALID)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(ca_uri(cluster_id).try_into()?)];
        let cert_pem = params.self_signed(&key)?.pem();
        Ok(Self {
            cluster: cluster_id.to_owned(),
            cert_pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// Writes `ca.pem` and `ca.key` (mode 0600) into `dir`, which is made when missing.
    pub fn save(&self, dir: &Path) -> Result<(), PkiError> {
        make_dir(dir)?;
        files::write(&dir.join("ca.key"), PRIVATE, &self.issuer.key().serialize_pem())?;
        files::write(&dir.join("ca.pem"), PUBLIC, &self.cert_pem)
    }

    /// Reads the CA that [`ClusterCa::save`] wrote into `dir`.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let (cert_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
        let cert = files::read(&cert_path, &files::open(&cert_path)?)?;
        let key = files::read_private(&key_path, &files::open(&key_path)?)?;
        let bad = |path: &Path, problem: String| PkiError::Pem {
            path: path.to_owned(),
            problem,
        };
        let cert_der = CertificateDer::from_pem_slice(&cert)
            .map_err(|error| bad(&cert_path, format!("no certificate in PEM form: {error}")))?;
        let uri = uri_of(&cert_der)?;
        let cluster = uri
            .strip_prefix("drover://")
            .and_then(|rest| rest.strip_suffix("/ca"))
            .ok_or_else(|| {
                bad(
                    &cert_path,
                    format!("{uri} is not the URI of a cluster's CA (drover://<cluster>/ca)"),
                )
            })?
            .to_owned();
        let key = std::str::from_utf8(&key)
            .map_err(|error| error.to_string())
            .and_then(|pem| KeyPair::from_pem(pem).map_err(|error| error.to_string()))
            .map_err(|error| bad(&key_path, format!("no private key in PEM form: {error}")))?;
        let cert_pem = String::from_utf8(cert).map_err(|error| bad(&cert_path, error.to_string()))?;
        let issuer = Issuer::from_ca_cert_pem(&cert_pem, key)?;
        Ok(Self {
            cluster,
            cert_pem,
            issuer,
        })
    }

    /// The cluster's id.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// The CA's certificate, PEM.
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// A certificate with a new key for one party.
    pub fn issue(&self, role: Role, name: &str) -> Result<Issued, PkiError> {
        check_name("name", name)?;
        let identity = Identity {
            cluster: self.cluster.clone(),
            role,
            name: name.to_owned(),
        };
        let mut params = params_for(&format!("{role} {name}"), PARTY_VALID)?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        let dns = match role {
            Role::Controller => vec![controller_dns(None), controller_dns(Some(name))],
            Role::Host => vec![host_dns(name)],
            Role::User | Role::Monitor => vec![],
        };
        if !dns.is_empty() {
            params
                .extended_key_usages
                .push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        for name in dns {
            params.subject_alt_names.push(SanType::DnsName(name.try_into()?));
        }
        let key = KeyPair::generate()?;
        let cert = params.signed_by(&key, &self.issuer)?;
        Ok(Issued {
            cert_pem: cert.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// Issues for one party and writes `ca.pem`, `<name>.pem` and `<name>.key` (mode 0600) into `dir`.
    pub fn issue_to(&self, dir: &Path, role: Role, name: &str) -> Result<TlsFiles, PkiError> {
        let issued = self.issue(role, name)?;
        make_dir(dir)?;
        let files = TlsFiles {
            ca: dir.join("ca.pem"),
            cert: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
        };
        files::write(&files.ca, PUBLIC, &self.cert_pem)?;
        files::write(&files.key, PRIVATE, &issued.key_pem)?;
        files::write(&files.cert, PUBLIC, &issued.cert_pem)?;
        Ok(files)
    }
}

fn ca_uri(cluster: &str) -> String {
    format!("drover://{cluster}/ca")
}

fn params_for(common_name: &str, valid: Duration) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    // RFC 5280 appendix A.1, ub-common-name: 64 characters.
    params.distinguished_name.push(
        DnType::CommonName,
        common_name.chars().take(64).collect::<String>(),
    );
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + valid;
    Ok(params)
}

fn make_dir(dir: &Path) -> Result<(), PkiError> {
    fs::create_dir_all(dir).map_err(|source| PkiError::File {
        path: dir.to_owned(),
        action: "write",
        source,
    })
}
