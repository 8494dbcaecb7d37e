//! Who calls, and whether the role may make the call (ARCHITECTURE.md §5).
//!
//! The certificate says who is at the other end. A controller that forwards a call names the caller in the metadata
//! `drover-caller`; that is believed of controllers only, and the role is checked again here, so that a mistake in one
//! controller's check is not everybody's.

use drover_pki::{Identity, Role, peer_identity};
use drover_proto::{Code, Fault};
use tonic::{Request, Status};

/// Metadata: on whose behalf a controller forwards a call, as an identity's URI.
pub(crate) const CALLER_KEY: &str = "drover-caller";
/// Metadata: the call was forwarded once and is not to be forwarded again.
pub(crate) const FORWARDED_KEY: &str = "drover-forwarded";

/// Whose service it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    /// For users, and for controllers on nobody's behalf.
    Controller,
    /// For hosts, each in its own name.
    Fleet,
}

/// The party that asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// On whose behalf: the peer itself, or whom a forwarding controller names.
    pub(crate) identity: Identity,
    /// Whether a controller has forwarded the call already.
    pub(crate) forwarded: bool,
}

impl Caller {
    /// The caller of `request`, when its role may use `service`.
    pub(crate) fn of<T>(request: &Request<T>, cluster: &str, service: Service) -> Result<Self, Status> {
        let peer = peer_identity(request, cluster)?;
        let named = |key| request.metadata().get(key).and_then(|value| value.to_str().ok());
        let caller = decide(peer, named(CALLER_KEY), named(FORWARDED_KEY).is_some(), service)?;
        Ok(caller)
    }

    /// As it stands in the log: "user/admin".
    pub(crate) fn audit_name(&self) -> String {
        format!("{}/{}", self.identity.role, self.identity.name)
    }

    /// A host speaks for itself only.
    pub(crate) fn speaks_for(&self, host: &str) -> Result<(), Fault> {
        if self.identity.role != Role::Host || self.identity.name == host {
            return Ok(());
        }
        let message = format!(
            "{} speaks for host {host:?}; a host speaks for itself only",
            self.identity
        );
        Err(Fault::new(Code::Denied, message).field("host"))
    }
}

fn decide(
    peer: Identity,
    on_behalf_of: Option<&str>,
    forwarded: bool,
    service: Service,
) -> Result<Caller, Fault> {
    let denied = |message: String| Fault::new(Code::Denied, message);
    let (identity, forwarded) = match (peer.role, on_behalf_of) {
        (Role::Controller, Some(uri)) => {
            let named: Identity = uri
                .parse()
                .map_err(|_| denied(format!("{CALLER_KEY} is {uri:?}; it is an identity's URI")))?;
            if named.cluster != peer.cluster {
                return Err(denied(format!("{named} is of another cluster than {peer}")));
            }
            (named, true)
        }
        (Role::Controller, None) => (peer, forwarded),
        _ => (peer, false),
    };
    let allowed = match service {
        Service::Controller => matches!(identity.role, Role::User | Role::Controller),
        Service::Fleet => matches!(identity.role, Role::Host | Role::Controller),
    };
    if allowed {
        return Ok(Caller { identity, forwarded });
    }
    Err(denied(match service {
        Service::Controller => format!("{identity} may not use the service Controller; users may"),
        Service::Fleet => format!("{identity} may not use the service Fleet; hosts may"),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(role: Role, name: &str) -> Identity {
        Identity {
            cluster: "dev".into(),
            role,
            name: name.into(),
        }
    }

    #[test]
    fn roles_are_kept_to_their_services() {
        let ask = |role, service| {
            decide(identity(role, "x"), None, false, service)
                .map(|_| ())
                .map_err(|f| f.code)
        };
        assert_eq!(ask(Role::User, Service::Controller), Ok(()));
        assert_eq!(ask(Role::Controller, Service::Controller), Ok(()));
        assert_eq!(ask(Role::Host, Service::Controller), Err(Code::Denied));
        assert_eq!(ask(Role::Host, Service::Fleet), Ok(()));
        assert_eq!(ask(Role::User, Service::Fleet), Err(Code::Denied));
    }

    #[test]
    fn only_a_controller_is_believed_when_it_names_a_caller() {
        let uri = "drover://dev/host/host1";
        let caller = decide(identity(Role::Controller, "c1"), Some(uri), true, Service::Fleet).unwrap();
        assert_eq!(
            (caller.audit_name().as_str(), caller.forwarded),
            ("host/host1", true)
        );
        let caller = decide(identity(Role::Host, "host2"), Some(uri), true, Service::Fleet).unwrap();
        assert_eq!(
            (caller.audit_name().as_str(), caller.forwarded),
            ("host/host2", false)
        );
        assert!(
            decide(
                identity(Role::Controller, "c1"),
                Some(uri),
                true,
                Service::Controller
            )
            .is_err()
        );
        let foreign = "drover://other/host/host1";
        assert!(
            decide(
                identity(Role::Controller, "c1"),
                Some(foreign),
                true,
                Service::Fleet
            )
            .is_err()
        );
    }

    #[test]
    fn a_host_speaks_for_itself_only() {
        let caller = Caller {
            identity: identity(Role::Host, "host1"),
            forwarded: false,
        };
        assert!(caller.speaks_for("host1").is_ok());
        assert_eq!(caller.speaks_for("host2").unwrap_err().code, Code::Denied);
    }
}
