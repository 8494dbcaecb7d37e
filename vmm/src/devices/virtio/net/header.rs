//! The header before each frame (5.1.6), the same at the guest's side and at the tap's: what of it may pass. Pure.

use super::{F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6};

/// Its bytes.
pub const HEADER_BYTES: usize = 12;
/// Where the number of chains stands that a received frame was put into.
const CHAINS_AT: usize = 10;

/// The checksum is to be completed: where from and where to follow.
const NEEDS_CSUM: u8 = 1;
/// The checksum was verified.
const DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

fn may_be_large(gso: u8, features: u64, tcpv4: u64, tcpv6: u64) -> bool {
    match gso {
        GSO_NONE => true,
        GSO_TCPV4 => features & tcpv4 != 0,
        GSO_TCPV6 => features & tcpv6 != 0,
        _ => false,
    }
}

/// Makes the driver's header one for the host; false: it asks for what was not agreed, and the frame goes nowhere (5.1.6.2).
pub fn transmit(header: &mut [u8; HEADER_BYTES], features: u64) -> bool {
    let [flags, gso, ..] = *header;
    let checksums = features & F_CSUM != 0;
    header[0] = flags & NEEDS_CSUM;
    header[CHAINS_AT..].fill(0);
    let large = gso == GSO_NONE || (checksums && flags & NEEDS_CSUM != 0);
    (checksums || header[0] == 0) && large && may_be_large(gso, features, F_HOST_TSO4, F_HOST_TSO6)
}

/// Makes the host's header one for the driver; false: the frame is one that it cannot take (5.1.6.4). It was queued before the host was told.
pub fn receive(header: &mut [u8; HEADER_BYTES], features: u64) -> bool {
    let [flags, gso, ..] = *header;
    let checksums = features & F_GUEST_CSUM != 0;
    if !checksums {
        header[0] &= !DATA_VALID;
    }
    (checksums || flags & NEEDS_CSUM == 0 && gso == GSO_NONE)
        && may_be_large(gso, features, F_GUEST_TSO4, F_GUEST_TSO6)
}

/// Writes the number of chains that the frame lies in.
pub fn set_chains(header: &mut [u8], chains: u16) {
    header[CHAINS_AT..HEADER_BYTES].copy_from_slice(&chains.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(flags: u8, gso: u8) -> [u8; HEADER_BYTES] {
        [flags, gso, 1, 2, 3, 4, 5, 6, 7, 8, 0xff, 0xff]
    }

    #[test]
    fn the_host_is_asked_only_for_what_was_agreed() {
        let both = F_CSUM | F_HOST_TSO4;
        for (flags, gso, features, may) in [
            (0, GSO_NONE, 0, true),
            (NEEDS_CSUM, GSO_NONE, 0, false),
            (NEEDS_CSUM, GSO_NONE, F_CSUM, true),
            (NEEDS_CSUM, GSO_TCPV4, both, true),
            (0, GSO_TCPV4, both, false),
            (NEEDS_CSUM, GSO_TCPV6, both, false),
            (NEEDS_CSUM, GSO_TCPV6, F_CSUM | F_HOST_TSO6, true),
            (NEEDS_CSUM, GSO_TCPV4 | 0x80, both, false),
            (NEEDS_CSUM, 3, u64::MAX, false),
            (DATA_VALID, GSO_NONE, 0, true),
        ] {
            let mut header = header(flags, gso);
            assert_eq!(
                transmit(&mut header, features),
                may,
                "{flags} {gso} {features:#x}"
            );
            assert_eq!((header[0] & !NEEDS_CSUM, &header[10..]), (0, [0, 0].as_slice()));
        }
    }

    #[test]
    fn a_driver_is_given_only_what_it_has_accepted() {
        let both = F_GUEST_CSUM | F_GUEST_TSO6;
        for (flags, gso, features, may, left) in [
            (DATA_VALID, GSO_NONE, 0, true, 0),
            (DATA_VALID, GSO_NONE, F_GUEST_CSUM, true, DATA_VALID),
            (NEEDS_CSUM, GSO_NONE, 0, false, NEEDS_CSUM),
            (NEEDS_CSUM, GSO_NONE, F_GUEST_CSUM, true, NEEDS_CSUM),
            (NEEDS_CSUM, GSO_TCPV6, both, true, NEEDS_CSUM),
            (NEEDS_CSUM, GSO_TCPV4, both, false, NEEDS_CSUM),
            (0, GSO_TCPV6, F_GUEST_TSO6, false, 0),
        ] {
            let mut header = header(flags, gso);
            assert_eq!(receive(&mut header, features), may, "{flags} {gso} {features:#x}");
            assert_eq!(header[0], left);
        }
        let mut one = header(0, 0);
        set_chains(&mut one, 0x102);
        assert_eq!(one[8..], [7, 8, 2, 1]);
    }
}
