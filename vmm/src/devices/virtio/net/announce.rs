//! Telling the network where a VM is: switches learn from any frame with its address behind which port it is.
//!
//! A reverse ARP request is such a frame, asks nobody for anything, and needs no IP address (RFC 903; QEMU and others send the same). It is sent
//! a few times, since links come up late and frames get lost. A driver that accepted `GUEST_ANNOUNCE` is asked besides to send what it knows to be
//! right (5.1.6.5.4): that reaches those who hold its IP address in their caches.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use drover_proto::{Code, Fault};

use super::{F_GUEST_ANNOUNCE, Mac, Net};
use crate::devices::complaints::complain;
use crate::devices::gate::IoGate;
use crate::devices::virtio::pci::VirtioPci;
use crate::sandbox::{self, Thread};

/// Before each time, ms.
const WAITS_MS: [u64; 6] = [0, 50, 100, 250, 600, 1500];

/// Bytes of the shortest frame, without its checksum.
const FRAME_BYTES: usize = 60;

/// A reverse ARP request of `mac`.
pub fn frame(mac: Mac) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    let parts: [&[u8]; 7] = [
        &[0xff; 6],
        &mac,
        &[0x80, 0x35],
        // Ethernet and IPv4 addresses; asks for its own.
        &[0, 1, 8, 0, 6, 4, 0, 3],
        &mac,
        &[0; 4],
        &mac,
    ];
    let bytes = parts.concat();
    frame[..bytes.len()].copy_from_slice(&bytes);
    frame
}

/// A NIC and its place on the bus.
pub type Place = (Arc<Net>, Arc<VirtioPci>);

/// Announces `nics`, in a thread that ends after the last time, or when the gate says so.
pub fn start(nics: Vec<Place>, gate: Arc<IoGate>) -> Result<JoinHandle<()>, Fault> {
    std::thread::Builder::new()
        .name("announce".to_owned())
        .spawn(move || run(&nics, &gate))
        .map_err(|error| Fault::new(Code::Internal, format!("no thread that announces: {error}")))
}

fn run(nics: &[Place], gate: &IoGate) {
    sandbox::narrow(Thread::Device);
    let mut asked = false;
    for wait in WAITS_MS {
        if gate.rest(Duration::from_millis(wait)) {
            return;
        }
        // The VM may stand again: then somebody else announces it.
        let Some(begun) = gate.begin() else {
            continue;
        };
        for (net, place) in nics {
            if !asked
                && place
                    .accepted()
                    .is_some_and(|features| features & F_GUEST_ANNOUNCE != 0)
            {
                net.ask_to_announce();
                place.config_changed();
            }
            if begun.in_time()
                && let Err(error) = net.send_own(&frame(net.mac()))
            {
                complain(|| format!("a NIC is not announced: {error}"));
            }
        }
        asked = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_a_request_of_the_address_for_itself() {
        let frame = frame([0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(
            frame[..14],
            [
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 1, 2, 3, 0x80, 0x35
            ]
        );
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&frame[6..12], &frame[6..12]));
        assert_eq!(frame[38..], [0; 22]);
    }
}
