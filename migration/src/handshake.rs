//! What source and target must share before a page is sent. Pure functions: the machines call them.

use std::ops::RangeInclusive;

use drover_proto::{Code, Fault};

use crate::codec::{Hello, MemoryRegion, REGIONS_MAX, bad};
use crate::vm::{Layout, PAGE_SIZE, Region};

/// Versions of the protocol that this build speaks.
pub const VERSIONS: RangeInclusive<u32> = 1..=1;

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
}

/// Judges the source's hello; gives the version to go on with.
pub fn check(hello: &Hello, expected: &Expected) -> Result<u32, Fault> {
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
    Ok(version)
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

/// The version that the target chose, judged by the source.
pub fn check_choice(chosen: u32, offered: &RangeInclusive<u32>) -> Result<u32, Fault> {
    if offered.contains(&chosen) {
        return Ok(chosen);
    }
    Err(bad(format!(
        "the target chose version {chosen}, {} to {} were offered",
        offered.start(),
        offered.end()
    )))
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
        }
    }

    fn hello() -> Hello {
        Hello {
            version_min: 1,
            version_max: 1,
            migration: "m1".into(),
            vm: "vm1".into(),
            from_host: "host1".into(),
            source_epoch: 1,
            target_epoch: 2,
            page_size: 4096,
            regions: regions(&expected().layout),
            device_model: 1,
            cpu_profile: "baseline".into(),
        }
    }

    #[test]
    fn a_hello_for_just_this_target_is_taken() {
        assert_eq!(check(&hello(), &expected()), Ok(1));
    }

    #[test]
    fn a_hello_that_differs_anywhere_is_refused_with_the_field() {
        type Change = fn(&mut Hello);
        let cases: [(Change, Code, &str); 10] = [
            (|h| h.version_min = 2, Code::ProtocolVersion, ""),
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
            if hello.version_min == 2 {
                hello.version_max = 2;
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
