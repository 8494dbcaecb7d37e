//! Everything that crosses a process boundary: gRPC messages and services, save-state, the replicated log's
//! entries, and the stable error codes. The `.proto` files are append-only.

pub mod codes;

/// The generated messages, clients and servers of package `drover.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("drover.v1");
}

pub use codes::{Code, Fault};

impl From<Fault> for v1::Reason {
    fn from(fault: Fault) -> Self {
        Self {
            code: fault.code.as_str().to_owned(),
            message: fault.message,
        }
    }
}
