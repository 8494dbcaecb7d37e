//! What source and target must share before a page is sent. Pure functions: the machines call them.

use std::ops::RangeInclusive;

use drover_proto::{Code, Fault};

use crate::codec::{Hello, HelloAck, MemoryRegion, REGIONS_MAX, bad};
use crate::vm::{Layout, PAGE_SIZE, Region};

/// Versions of the protocol that this build speaks. In version 1 all pages travel on the link itself; from 2 on they may have
/// streams of their own.
pub const VERSIONS: RangeInclusive<u32> = 1..=2;
/// The first version with streams.
const VERSION_STREAMS: u32 = 2;
/// Most streams for pages.
pub const STREAMS_MAX: u32 = 16;
/// Length of the token that binds a stream to its migration, bytes.
pub const TOKEN_BYTES: usize = 32;

/// What two sides of one version may or may not be able to do, a bit each. The source offers, the target keeps what it knows; a bit that
/// is not agreed on is not used.
pub mod feature {
    /// A page may come for the first time in a later round than the first: the target counts them at the end.
    pub const LATE_PAGES: u32 = 1;
    /// The source may let the VM run at the target before all its pages are there. Offered only where the intent allows it.
    pub const POST_COPY: u32 = 2;
    /// All that this build can do.
    pub const ALL: u32 = LATE_PAGES | POST_COPY | ENCODED;
    /// Pages may come compressed with LZ4.
    pub const LZ4: u32 = 16;
    /// Pages may come compressed with Zstandard.
    pub const ZSTD: u32 = 32;
    /// From the second round on pages may come as what changed in them.
    pub const DELTAS: u32 = 64;
    /// All forms of pages beside the plain one.
    pub const ENCODED: u32 = LZ4 | ZSTD | DELTAS;
}

/// The highest version that both speak.
pub fn negotiate(ours: RangeInclusive<u32>, theirs: RangeInclusive<u32>) -> Result<u32, Fault> {
    let version = *ours.end().min(theirs.end());
    if ours.contains(&version) && theirs.contains(&version) {
        return Ok(version);
    }
    let older = if theirs.end() < ours.start() {
        "the peer's host"
    } else {
        "this host"
    };
    Err(Fault::new(
        Code::ProtocolVersion,
        format!(
            "this VMM speaks versions {} to {} of the migration protocol, its peer {} to {}: upgrade {older}",
            ours.start(),
            ours.end(),
            theirs.start(),
            theirs.end()
        ),
    ))
}

/// What the target was started for.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Protocol versions spoken.
    pub versions: RangeInclusive<u32>,
    /// The migration's id.
    pub migration: String,
    /// The VM's name.
    pub vm: String,
    /// The source's host.
    pub from_host: String,
    /// The epoch of the target.
    pub epoch: u64,
    /// The target's memory.
    pub layout: Layout,
    /// Highest version of the save-state that can be read.
    pub device_model: u32,
    /// The CPU profile's name.
    pub cpu_profile: String,
    /// Whether pages may come unencrypted.
    pub plaintext: bool,
    /// Whether the memory itself is handed over, on one host, and no page comes.
    pub local: bool,
    /// What streams have to show: random, and of this migration alone.
    pub token: [u8; TOKEN_BYTES],
    /// Whether the VM could be taken by post-copy, or why not.
    pub post_copy: Result<(), Fault>,
}

/// How pages travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// The protocol's version.
    pub version: u32,
    /// Streams beside the link; 0: pages travel on the link.
    pub streams: u32,
    /// Whether those streams go without TLS.
    pub plaintext: bool,
    /// See [`feature`].
    pub features: u32,
    /// Whether no page travels at all, because the target takes over the memory itself.
    pub local: bool,
}

/// Judges the source's hello; gives what to go on with.
pub fn check(hello: &Hello, expected: &Expected) -> Result<Agreed, Fault> {
    let version = negotiate(expected.versions.clone(), hello.version_min..=hello.version_max)?;
    same(Code::Denied, "migration", &hello.migration, &expected.migration)?;
    same(Code::Denied, "vm", &hello.vm, &expected.vm)?;
    same(Code::Denied, "from_host", &hello.from_host, &expected.from_host)?;
    let before = expected.epoch.checked_sub(1);
    if hello.target_epoch != expected.epoch || Some(hello.source_epoch) != before {
        return Err(Fault::new(
            Code::StaleEpoch,
            format!(
                "the source offers {} of epoch {} for epoch {}, this VMM was started for epoch {}",
                hello.vm, hello.source_epoch, hello.target_epoch, expected.epoch
            ),
        )
        .field("target_epoch"));
    }
    if hello.page_size as usize != PAGE_SIZE {
        return Err(refused(
            "page_size",
            format!("pages have {} bytes, {PAGE_SIZE} are due", hello.page_size),
        ));
    }
    if hello.regions != regions(&expected.layout) || hello.regions.len() > REGIONS_MAX {
        return Err(refused(
            "regions",
            format!(
                "the source's memory ({}) is not laid out as this VMM's ({})",
                sketch(&hello.regions),
                sketch(&regions(&expected.layout))
            ),
        ));
    }
    if hello.device_model == 0 || hello.device_model > expected.device_model {
        return Err(refused(
            "device_model",
            format!(
                "the source saves device model {}, this VMM reads 1 to {}: upgrade this host first",
                hello.device_model, expected.device_model
            ),
        ));
    }
    same(
        Code::TargetFailed,
        "cpu_profile",
        &hello.cpu_profile,
        &expected.cpu_profile,
    )?;
    if hello.local != expected.local {
        let means = |local| if local { "handed over" } else { "sent" };
        let message = format!(
            "the source wants the memory to be {}, this VMM was started for one whose memory is {}",
            means(hello.local),
            means(expected.local)
        );
        return Err(Fault::new(Code::Denied, message).field("local"));
    }
    let known = match expected.post_copy {
        Ok(()) if !expected.local => feature::ALL,
        _ => feature::ALL & !feature::POST_COPY,
    };
    let features = hello.features & known;
    if version < VERSION_STREAMS || hello.streams == 0 || hello.local {
        return Ok(Agreed {
            version,
            features,
            local: hello.local,
            ..Agreed::default()
        });
    }
    if hello.plaintext && !expected.plaintext {
        return Err(Fault::new(
            Code::Denied,
            "the source wants to send pages unencrypted, this VMM was started for encrypted ones only",
        )
        .field("plaintext"));
    }
    Ok(Agreed {
        version,
        streams: hello.streams.min(STREAMS_MAX),
        plaintext: hello.plaintext,
        features,
        local: false,
    })
}

/// The layout as it stands in a hello.
pub fn regions(layout: &[Region]) -> Vec<MemoryRegion> {
    layout
        .iter()
        .map(|region| MemoryRegion {
            gpa: region.gpa,
            len: region.len,
        })
        .collect()
}

/// Pages of guest memory; a layout that is not made of whole pages in ascending order is refused.
pub fn total_pages(layout: &[Region]) -> Result<u64, Fault> {
    let page = PAGE_SIZE as u64;
    let (mut end, mut pages) = (0_u64, 0_u64);
    for region in layout {
        let sound = region.gpa >= end
            && region.len > 0
            && region.gpa.is_multiple_of(page)
            && region.len.is_multiple_of(page);
        let (true, Some(next)) = (sound, region.gpa.checked_add(region.len)) else {
            return Err(Fault::new(
                Code::Internal,
                format!(
                    "guest memory has the region {region:?}, which is empty, not of whole pages, or out of order"
                ),
            ));
        };
        end = next;
        pages += region.len / page;
    }
    if pages == 0 || layout.len() > REGIONS_MAX {
        return Err(Fault::new(
            Code::Internal,
            format!(
                "guest memory has {} regions, 1 to {REGIONS_MAX} can be moved",
                layout.len()
            ),
        ));
    }
    Ok(pages)
}

/// What the target chose, judged by the source.
pub fn check_choice(ack: &HelloAck, hello: &Hello) -> Result<Agreed, Fault> {
    let offered = hello.version_min..=hello.version_max;
    if !offered.contains(&ack.version) {
        return Err(bad(format!(
            "the target chose version {}, {} to {} were offered",
            ack.version,
            offered.start(),
            offered.end()
        )));
    }
    let streams_max = if ack.version < VERSION_STREAMS || hello.local {
        0
    } else {
        hello.streams
    };
    if ack.streams > streams_max || (ack.streams > 0 && ack.token.len() != TOKEN_BYTES) {
        return Err(bad(format!(
            "the target agreed to {} streams with a token of {} bytes, {streams_max} streams and {TOKEN_BYTES} bytes are the most",
            ack.streams,
            ack.token.len()
        )));
    }
    if ack.features & !hello.features != 0 {
        return Err(bad(format!(
            "the target agreed to features {:#x}, {:#x} were offered",
            ack.features, hello.features
        )));
    }
    Ok(Agreed {
        version: ack.version,
        streams: ack.streams,
        plaintext: ack.streams > 0 && hello.plaintext,
        features: ack.features,
        local: hello.local,
    })
}

fn same(code: Code, field: &str, found: &str, due: &str) -> Result<(), Fault> {
    if found == due {
        return Ok(());
    }
    let message = format!("the source says {field} {found:?}, this VMM was started for {due:?}");
    Err(Fault::new(code, message).field(field))
}

fn refused(field: &str, message: String) -> Fault {
    Fault::new(Code::TargetFailed, message).field(field)
}

/// At most a few regions in words.
fn sketch(regions: &[MemoryRegion]) -> String {
    const SHOWN: usize = 4;
    let shown: Vec<_> = regions
        .iter()
        .take(SHOWN)
        .map(|r| format!("{} bytes at {:#x}", r.len, r.gpa))
        .collect();
    let more = if regions.len() > SHOWN { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_common_version_is_chosen() {
        for (ours, theirs, version) in [
            (1..=1, 1..=1, 1),
            (1..=3, 2..=5, 3),
            (2..=5, 1..=3, 3),
            (1..=9, 4..=4, 4),
            (7..=7, 1..=9, 7),
        ] {
            assert_eq!(
                negotiate(ours.clone(), theirs.clone()),
                Ok(version),
                "{ours:?} with {theirs:?}"
            );
        }
    }

    #[test]
    fn builds_without_a_common_version_refuse_each_other_and_say_who_is_older() {
        for (ours, theirs, advice) in [
            (2..=3, 1..=1, "upgrade the peer's host"),
            (1..=1, 2..=3, "upgrade this host"),
            (1..=3, RangeInclusive::new(9, 2), "upgrade"),
            (1..=3, 0..=0, "upgrade the peer's host"),
        ] {
            let fault = negotiate(ours, theirs).unwrap_err();
            assert_eq!(fault.code, Code::ProtocolVersion);
            assert!(fault.message.contains(advice), "{fault}");
        }
    }

    fn expected() -> Expected {
        Expected {
            versions: VERSIONS,
            migration: "m1".into(),
            vm: "vm1".into(),
            from_host: "host1".into(),
            epoch: 2,
            layout: vec![
                Region { gpa: 0, len: 0x8000 },
                Region {
                    gpa: 0x10_0000,
                    len: 0x1000,
                },
            ],
            device_model: 2,
            cpu_profile: "baseline".into(),
            plaintext: false,
            local: false,
            token: [7; TOKEN_BYTES],
            post_copy: Ok(()),
        }
    }

    fn hello() -> Hello {
        Hello {
            version_min: 1,
            version_max: 2,
            streams: 40,
            plaintext: false,
            local: false,
            migration: "m1".into(),
            vm: "vm1".into(),
            from_host: "host1".into(),
            source_epoch: 1,
            target_epoch: 2,
            page_size: 4096,
            regions: regions(&expected().layout),
            device_model: 1,
            cpu_profile: "baseline".into(),
            features: u32::MAX,
        }
    }

    #[test]
    fn a_hello_for_just_this_target_is_taken() {
        let agreed = Agreed {
            version: 2,
            streams: STREAMS_MAX,
            plaintext: false,
            features: feature::ALL,
            local: false,
        };
        assert_eq!(check(&hello(), &expected()), Ok(agreed));
        let old = Hello {
            version_max: 1,
            features: 0,
            ..hello()
        };
        let alone = Agreed {
            version: 1,
            ..Agreed::default()
        };
        assert_eq!(check(&old, &expected()), Ok(alone), "a build without streams");
    }

    #[test]
    fn pages_go_unencrypted_only_if_both_sides_were_told_so() {
        let wants = Hello {
            plaintext: true,
            ..hello()
        };
        let fault = check(&wants, &expected()).unwrap_err();
        assert_eq!((fault.code, fault.field.as_str()), (Code::Denied, "plaintext"));
        let told = Expected {
            plaintext: true,
            ..expected()
        };
        assert!(check(&wants, &told).unwrap().plaintext);
        assert!(!check(&hello(), &told).unwrap().plaintext);
    }

    #[test]
    fn memory_is_handed_over_only_to_a_target_that_was_started_for_that_and_then_no_stream_is_agreed_on() {
        let hands_over = Hello {
            local: true,
            ..hello()
        };
        let on_this_host = Expected {
            local: true,
            ..expected()
        };
        for (hello, expected) in [(&hands_over, &expected()), (&hello(), &on_this_host)] {
            let fault = check(hello, expected).unwrap_err();
            assert_eq!((fault.code, fault.field.as_str()), (Code::Denied, "local"));
        }
        let agreed = check(&hands_over, &on_this_host).unwrap();
        assert_eq!((agreed.local, agreed.streams), (true, 0));
        let ack = HelloAck {
            version: 2,
            streams: 1,
            token: vec![1; TOKEN_BYTES],
            ..HelloAck::default()
        };
        assert_eq!(check_choice(&ack, &hands_over).unwrap_err().code, Code::BadFrame);
    }

    #[test]
    fn a_choice_that_was_not_offered_is_refused() {
        let ack = |version, streams, token| HelloAck {
            version,
            streams,
            token: vec![1; token],
            features: 0,
            ..HelloAck::default()
        };
        assert_eq!(
            check_choice(&ack(2, 3, TOKEN_BYTES), &hello()).unwrap().streams,
            3
        );
        assert_eq!(check_choice(&ack(1, 0, 0), &hello()).unwrap().streams, 0);
        for wrong in [
            ack(0, 0, 0),
            ack(3, 0, 0),
            ack(1, 1, TOKEN_BYTES),
            ack(2, 41, TOKEN_BYTES),
            ack(2, 1, TOKEN_BYTES - 1),
            ack(2, 1, 0),
        ] {
            assert_eq!(
                check_choice(&wrong, &hello()).unwrap_err().code,
                Code::BadFrame,
                "{wrong:?}"
            );
        }
        let unasked = HelloAck {
            features: 1 << 31,
            ..ack(1, 0, 0)
        };
        let offer = Hello {
            features: feature::ALL,
            ..hello()
        };
        assert_eq!(check_choice(&unasked, &offer).unwrap_err().code, Code::BadFrame);
    }

    #[test]
    fn a_hello_that_differs_anywhere_is_refused_with_the_field() {
        type Change = fn(&mut Hello);
        let cases: [(Change, Code, &str); 10] = [
            (|h| h.version_min = 9, Code::ProtocolVersion, ""),
            (|h| h.migration = "m2".into(), Code::Denied, "migration"),
            (|h| h.vm = "vm2".into(), Code::Denied, "vm"),
            (|h| h.from_host = "host3".into(), Code::Denied, "from_host"),
            (|h| h.target_epoch = 3, Code::StaleEpoch, "target_epoch"),
            (|h| h.source_epoch = 0, Code::StaleEpoch, "target_epoch"),
            (|h| h.page_size = 65536, Code::TargetFailed, "page_size"),
            (|h| h.regions.truncate(1), Code::TargetFailed, "regions"),
            (|h| h.device_model = 3, Code::TargetFailed, "device_model"),
            (
                |h| h.cpu_profile = "host".into(),
                Code::TargetFailed,
                "cpu_profile",
            ),
        ];
        for (change, code, field) in cases {
            let mut hello = hello();
            change(&mut hello);
            if hello.version_min == 9 {
                hello.version_max = 9;
            }
            let fault = check(&hello, &expected()).unwrap_err();
            assert_eq!((fault.code, fault.field.as_str()), (code, field), "{fault}");
        }
    }

    #[test]
    fn a_layout_of_broken_regions_is_refused() {
        assert_eq!(total_pages(&expected().layout), Ok(9));
        for layout in [
            vec![],
            vec![Region { gpa: 0, len: 0 }],
            vec![Region { gpa: 0, len: 4097 }],
            vec![Region { gpa: 1, len: 4096 }],
            vec![Region { gpa: 0, len: 8192 }, Region { gpa: 4096, len: 4096 }],
            vec![Region {
                gpa: u64::MAX - 4095,
                len: 4096,
            }],
        ] {
            assert!(total_pages(&layout).is_err(), "{layout:?}");
        }
    }
}
