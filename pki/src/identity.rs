//! Identities and how they stand in certificates.

use std::fmt;
use std::str::FromStr;

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::PkiError;

/// Longest cluster id or name: a DNS label (RFC 1035 §2.3.4).
const NAME_LEN_MAX: usize = 63;
/// What every identity's URI begins with.
const SCHEME: &str = "drover://";
/// The DNS name that every controller answers to.
const ANY_CONTROLLER: &str = "controller.drover";

/// What a party is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// A member of the controllers' Raft group.
    Controller,
    /// A host: its agent and its VMMs.
    Host,
    /// A person or a script.
    User,
    /// Whatever reads metrics, and may do nothing else.
    Monitor,
}

impl Role {
    /// The role as it stands in an identity.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Controller => "controller",
            Role::Host => "host",
            Role::User => "user",
            Role::Monitor => "monitor",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, PkiError> {
        [Role::Controller, Role::Host, Role::User, Role::Monitor]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| PkiError::NoIdentity(text.to_owned()))
    }
}

/// Who a party is: `drover://<cluster>/<role>/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The cluster's id.
    pub cluster: String,
    /// What the party is.
    pub role: Role,
    /// Its name, unique within its role.
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.cluster, self.role, self.name)
    }
}

impl FromStr for Identity {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, PkiError> {
        let no_identity = || PkiError::NoIdentity(text.to_owned());
        let rest = text.strip_prefix(SCHEME).ok_or_else(no_identity)?;
        let mut parts = rest.split('/');
        let (Some(cluster), Some(role), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(no_identity());
        };
        let role = role.parse().map_err(|_| no_identity())?;
        check_name("cluster", cluster)?;
        check_name("name", name)?;
        Ok(Identity {
            cluster: cluster.to_owned(),
            role,
            name: name.to_owned(),
        })
    }
}

/// Refuses what is no DNS label in lower case.
pub(crate) fn check_name(field: &'static str, value: &str) -> Result<(), PkiError> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let fits = (1..=NAME_LEN_MAX).contains(&value.len())
        && value.bytes().all(allowed)
        && !value.starts_with('-')
        && !value.ends_with('-');
    if fits {
        Ok(())
    } else {
        Err(PkiError::Name {
            field,
            value: value.to_owned(),
        })
    }
}

/// The DNS name of one controller, or of any of them.
pub fn controller_dns(name: Option<&str>) -> String {
    name.map_or_else(
        || ANY_CONTROLLER.to_owned(),
        |name| format!("{name}.{ANY_CONTROLLER}"),
    )
}

/// The DNS name of a host's agent and VMMs.
pub fn host_dns(name: &str) -> String {
    format!("{name}.host.drover")
}

/// The one `drover:` URI among a certificate's names.
pub(crate) fn uri_of(certificate: &CertificateDer<'_>) -> Result<String, PkiError> {
    let broken = |why: String| PkiError::Denied(format!("the certificate cannot be read: {why}"));
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| broken(error.to_string()))?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|error| broken(error.to_string()))?;
    let mut uris = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) if uri.starts_with(SCHEME) => Some((*uri).to_owned()),
            _ => None,
        });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => Ok(uri),
        (None, _) => Err(PkiError::Denied(
            "the certificate names no Drover identity: want one SAN URI drover://<cluster>/<role>/<name>"
                .to_owned(),
        )),
        (Some(first), Some(second)) => Err(PkiError::Denied(format!(
            "the certificate names two identities, {first} and {second}: want one"
        ))),
    }
}

/// Who presents `chain`, which TLS has verified already; its first certificate is the party's own. Anybody of another
/// cluster than `cluster` is refused with the code `denied`.
pub fn identity_of(chain: &[CertificateDer<'_>], cluster: &str) -> Result<Identity, PkiError> {
    let Some(own) = chain.first() else {
        return Err(PkiError::Denied(format!(
            "no certificate was presented: want one of cluster {cluster:?}"
        )));
    };
    let uri = uri_of(own)?;
    let identity: Identity = uri.parse().map_err(|_| {
        PkiError::Denied(format!(
            "the certificate's identity {uri} is malformed: want drover://{cluster}/<role>/<name>"
        ))
    })?;
    if identity.cluster != cluster {
        return Err(PkiError::Denied(format!(
            "the certificate is of {identity}, of cluster {:?}: want one of cluster {cluster:?}",
            identity.cluster
        )));
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_reads_back_what_it_shows() {
        for role in [Role::Controller, Role::Host, Role::User] {
            let identity = Identity {
                cluster: "dev-3f9a".into(),
                role,
                name: "n1".into(),
            };
            assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity);
        }
        assert_eq!(
            Identity {
                cluster: "c".into(),
                role: Role::Host,
                name: "h".into()
            }
            .to_string(),
            "drover://c/host/h"
        );
    }

    #[test]
    fn what_is_no_identity_is_refused() {
        let long = format!("drover://c/host/{}", "a".repeat(64));
        for text in [
            "",
            "drover://",
            "drover://c/host",
            "drover://c/host/h/x",
            "drover://c/root/h",
            "https://c/host/h",
            "drover:///host/h",
            "drover://c/host/",
            "drover://C/host/h",
            "drover://c/host/-h",
            "drover://c/host/h-",
            "drover://c/host/../h",
            &long,
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text} was taken");
        }
    }

    #[test]
    fn an_empty_chain_and_garbage_are_denied() {
        use drover_proto::Code;
        assert_eq!(identity_of(&[], "c").unwrap_err().code(), Code::Denied);
        assert_eq!(
            identity_of(&[CertificateDer::from(vec![1, 2, 3])], "c")
                .unwrap_err()
                .code(),
            Code::Denied
        );
    }
}
