//! A station on an Ethernet that answers two questions: who has its IP address (ARP), and whether it is there (ICMP echo).
//!
//! Sources: RFC 826 (ARP), RFC 791 (IPv4), RFC 792 (ICMP). Everything else, and everything damaged, is left unanswered.

/// Bytes of the longest frame, without its checksum.
pub const FRAME_MAX: usize = 1514;

const ETHERNET: usize = 14;
const ARP: [u8; 2] = [0x08, 0x06];
const IPV4: [u8; 2] = [0x08, 0x00];
/// Of ARP: Ethernet and IPv4 addresses.
const ARP_KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: [u8; 2] = [0, 1];
const ARP_REPLY: [u8; 2] = [0, 2];
const ARP_BYTES: usize = 28;
const ICMP: u8 = 1;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ICMP_BYTES_MIN: usize = 8;

/// The station.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Station {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub ip: [u8; 4],
}

impl Station {
    /// Writes the answer to `frame`, if it gets one, to `out`; returns its length.
    #[must_use]
    pub fn answer(&self, frame: &[u8], out: &mut [u8; FRAME_MAX]) -> Option<usize> {
        let (ethernet, body) = frame.split_at_checked(ETHERNET)?;
        let to_us = ethernet[..6] == self.mac;
        let len = match [ethernet[12], ethernet[13]] {
            ARP if to_us || ethernet[..6] == [0xff; 6] => self.answer_arp(body, out)?,
            IPV4 if to_us => self.answer_echo(body, out)?,
            _ => return None,
        };
        out[..6].copy_from_slice(&ethernet[6..12]);
        out[6..12].copy_from_slice(&self.mac);
        out[12..14].copy_from_slice(&ethernet[12..]);
        Some(ETHERNET + len)
    }

    fn answer_arp(&self, body: &[u8], out: &mut [u8]) -> Option<usize> {
        let request = body.get(..ARP_BYTES)?;
        if request[..6] != ARP_KIND || request[6..8] != ARP_REQUEST || request[24..] != self.ip {
            return None;
        }
        let reply = &mut out[ETHERNET..ETHERNET + ARP_BYTES];
        reply[..6].copy_from_slice(&ARP_KIND);
        reply[6..8].copy_from_slice(&ARP_REPLY);
        reply[8..14].copy_from_slice(&self.mac);
        reply[14..18].copy_from_slice(&self.ip);
        reply[18..].copy_from_slice(&request[8..18]);
        Some(ARP_BYTES)
    }

    fn answer_echo(&self, body: &[u8], out: &mut [u8]) -> Option<usize> {
        let first = *body.first()?;
        let header = 4 * usize::from(first & 0xf);
        if first >> 4 != 4 || header < 20 || body.len() < header {
            return None;
        }
        let total = usize::from(u16::from_be_bytes([body[2], body[3]]));
        let whole = body.get(..total).filter(|_| total >= header + ICMP_BYTES_MIN)?;
        let fragment = u16::from_be_bytes([whole[6], whole[7]]) & 0x3fff != 0;
        let (head, message) = whole.split_at(header);
        let for_us = head[9] == ICMP && head[16..20] == self.ip && !fragment;
        if !for_us || sum(head) != 0 || sum(message) != 0 || message[..2] != [ECHO_REQUEST, 0] {
            return None;
        }
        // Without the request's options.
        let reply = out[ETHERNET..].get_mut(..20 + message.len())?;
        let length = u16::try_from(reply.len()).ok()?;
        reply[..20].copy_from_slice(&[
            0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, ICMP, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ]);
        reply[2..4].copy_from_slice(&length.to_be_bytes());
        reply[12..16].copy_from_slice(&self.ip);
        reply[16..20].copy_from_slice(&head[12..16]);
        let check = sum(&reply[..20]);
        reply[10..12].copy_from_slice(&check.to_be_bytes());
        let answer = &mut reply[20..];
        answer.copy_from_slice(message);
        answer[..4].copy_from_slice(&[ECHO_REPLY, 0, 0, 0]);
        let check = sum(answer);
        answer[2..4].copy_from_slice(&check.to_be_bytes());
        Some(usize::from(length))
    }
}

/// The Internet checksum (RFC 1071); zero over what carries a right one.
fn sum(bytes: &[u8]) -> u16 {
    let mut total = 0u32;
    for pair in bytes.chunks(2) {
        total += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    const US: Station = Station {
        mac: [2, 0, 0, 0, 0, 2],
        ip: [10, 0, 0, 2],
    };
    const THEM: Station = Station {
        mac: [2, 0, 0, 0, 0, 1],
        ip: [10, 0, 0, 1],
    };

    fn answer(frame: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0xee; FRAME_MAX];
        US.answer(frame, &mut out).map(|len| out[..len].to_vec())
    }

    fn ethernet(to: [u8; 6], kind: [u8; 2], body: &[u8]) -> Vec<u8> {
        [&to, &THEM.mac, kind.as_slice(), body].concat()
    }

    fn arp(target: [u8; 4]) -> Vec<u8> {
        let body = [
            ARP_KIND.as_slice(),
            &ARP_REQUEST,
            &THEM.mac,
            &THEM.ip,
            &[0; 6],
            &target,
            &[0; 18],
        ];
        ethernet([0xff; 6], ARP, &body.concat())
    }

    fn echo(payload: usize) -> Vec<u8> {
        let mut message = vec![ECHO_REQUEST, 0, 0, 0, 0x12, 0x34, 0, 7];
        message.extend((0..payload).map(|at| at as u8));
        let check = sum(&message);
        message[2..4].copy_from_slice(&check.to_be_bytes());
        let mut head = vec![0x45, 0, 0, 0, 0xab, 0xcd, 0x40, 0, 63, ICMP, 0, 0];
        head.extend(THEM.ip.iter().chain(&US.ip));
        let total = (20 + message.len()) as u16;
        head[2..4].copy_from_slice(&total.to_be_bytes());
        let check = sum(&head);
        head[10..12].copy_from_slice(&check.to_be_bytes());
        ethernet(US.mac, IPV4, &[head, message].concat())
    }

    #[test]
    fn whoever_asks_for_our_address_is_told_and_for_anothers_is_not() {
        let reply = answer(&arp(US.ip)).unwrap();
        assert_eq!(
            reply[..14],
            ethernet(THEM.mac, ARP, &[])[..6]
                .iter()
                .chain(&US.mac)
                .chain(&ARP)
                .copied()
                .collect::<Vec<u8>>()
        );
        assert_eq!(reply[20..22], ARP_REPLY);
        assert_eq!(
            (&reply[22..28], &reply[28..32]),
            (US.mac.as_slice(), US.ip.as_slice())
        );
        assert_eq!(
            (&reply[32..38], &reply[38..42]),
            (THEM.mac.as_slice(), THEM.ip.as_slice())
        );
        assert_eq!((reply.len(), answer(&arp(THEM.ip))), (42, None));
    }

    #[test]
    fn an_echo_comes_back_with_what_was_sent_and_right_checksums() {
        for payload in [0, 1, 56, 1472] {
            let request = echo(payload);
            let reply = answer(&request).unwrap();
            assert_eq!(reply.len(), request.len());
            assert_eq!((sum(&reply[14..34]), sum(&reply[34..])), (0, 0));
            assert_eq!(
                (&reply[26..30], &reply[30..34]),
                (US.ip.as_slice(), THEM.ip.as_slice())
            );
            assert_eq!((reply[34], &reply[38..]), (ECHO_REPLY, &request[38..]));
        }
        let mut padded = echo(1);
        padded.resize(60, 0);
        assert_eq!(answer(&padded).unwrap().len(), 43);
    }

    #[test]
    fn what_is_damaged_cut_or_not_for_us_is_left_unanswered() {
        let good = echo(56);
        for len in 0..good.len() {
            assert_eq!(answer(&good[..len]), None, "{len}");
        }
        for at in (0..6).chain(12..good.len()) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert_eq!(answer(&bad), None, "{at}");
        }
        let mut long = echo(1473);
        assert_eq!(answer(&long), None, "longer than a frame");
        long[16] = 0xff;
        assert_eq!(answer(&long), None);
        for len in 0..arp(US.ip).len() - 18 {
            assert_eq!(answer(&arp(US.ip)[..len]), None, "{len}");
        }
    }
}
