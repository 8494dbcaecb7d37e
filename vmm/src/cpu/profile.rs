//! What the guest sees of the CPU: CPUID, masked to a profile.
//!
//! | profile | features |
//! | --- | --- |
//! | `host` | all that KVM offers on this host, but for VMX and SVM: a guest that runs guests has state that is not saved yet |
//! | `x86-64-v2`, `x86-64-v3` | the psABI's level, all of it, and nothing else that one could compute with; refused where KVM lacks a part |
//! | `baseline` | as `x86-64-v2`, less whatever KVM lacks here |
//!
//! A level also keeps what a hypervisor's guest needs to run well: x2APIC, the TSC deadline timer, the hypervisor bit, and
//! KVM's leaves for kvmclock. Names and members of the levels: x86-64 psABI, table "Micro-architecture levels"; bits: Intel SDM
//! volume 2, CPUID, and AMD APM volume 3, appendix E.
//!
//! A received VM keeps the CPUID it was started with; [`missing`] says by name what it uses that this host lacks.

use drover_proto::{Code, Fault};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::Deserialize;

/// Which features a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Profile {
    /// As much of x86-64-v2 as KVM offers.
    #[default]
    #[serde(rename = "baseline")]
    Baseline,
    /// The psABI's level 2.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// The psABI's level 3.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// Everything KVM offers here but nested virtualization.
    #[serde(rename = "host")]
    Host,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}
use Register::{Ebx, Ecx, Edx};

/// A feature bit: leaf, register, bit, name, and the lowest level that demands it (0: allowed in a level, never demanded).
type Feature = (u32, Register, u32, &'static str, u8);

const LEAF_1: u32 = 1;
const LEAF_7: u32 = 7;
const LEAF_EXT: u32 = 0x8000_0001;

const FEATURES: &[Feature] = &[
    (LEAF_1, Edx, 0, "fpu", 1),
    (LEAF_1, Edx, 1, "vme", 0),
    (LEAF_1, Edx, 2, "de", 0),
    (LEAF_1, Edx, 3, "pse", 0),
    (LEAF_1, Edx, 4, "tsc", 0),
    (LEAF_1, Edx, 5, "msr", 0),
    (LEAF_1, Edx, 6, "pae", 0),
    (LEAF_1, Edx, 7, "mce", 0),
    (LEAF_1, Edx, 8, "cx8", 1),
    (LEAF_1, Edx, 9, "apic", 0),
    (LEAF_1, Edx, 11, "sep", 0),
    (LEAF_1, Edx, 12, "mtrr", 0),
    (LEAF_1, Edx, 13, "pge", 0),
    (LEAF_1, Edx, 14, "mca", 0),
    (LEAF_1, Edx, 15, "cmov", 1),
    (LEAF_1, Edx, 16, "pat", 0),
    (LEAF_1, Edx, 17, "pse36", 0),
    (LEAF_1, Edx, 19, "clflush", 0),
    (LEAF_1, Edx, 23, "mmx", 1),
    (LEAF_1, Edx, 24, "fxsr", 1),
    (LEAF_1, Edx, 25, "sse", 1),
    (LEAF_1, Edx, 26, "sse2", 1),
    (LEAF_1, Edx, 28, "htt", 0),
    (LEAF_1, Ecx, 0, "sse3", 2),
    (LEAF_1, Ecx, 9, "ssse3", 2),
    (LEAF_1, Ecx, 12, "fma", 3),
    (LEAF_1, Ecx, 13, "cx16", 2),
    (LEAF_1, Ecx, 19, "sse4_1", 2),
    (LEAF_1, Ecx, 20, "sse4_2", 2),
    (LEAF_1, Ecx, 21, "x2apic", 0),
    (LEAF_1, Ecx, 22, "movbe", 3),
    (LEAF_1, Ecx, 23, "popcnt", 2),
    (LEAF_1, Ecx, 24, "tsc_deadline", 0),
    (LEAF_1, Ecx, 26, "xsave", 3),
    (LEAF_1, Ecx, 27, "osxsave", 0),
    (LEAF_1, Ecx, 28, "avx", 3),
    (LEAF_1, Ecx, 29, "f16c", 3),
    (LEAF_1, Ecx, 31, "hypervisor", 0),
    (LEAF_7, Ebx, 3, "bmi1", 3),
    (LEAF_7, Ebx, 5, "avx2", 3),
    (LEAF_7, Ebx, 8, "bmi2", 3),
    (LEAF_EXT, Ecx, 0, "lahf_lm", 2),
    (LEAF_EXT, Ecx, 5, "lzcnt", 3),
    (LEAF_EXT, Edx, 11, "syscall", 1),
    (LEAF_EXT, Edx, 20, "nx", 0),
    (LEAF_EXT, Edx, 29, "lm", 1),
];

/// Bits of leaf 0x80000001 EDX that AMD mirrors from leaf 1.
const EXT_EDX_MIRROR: u32 = 0x0183_f3ff;

const LEAF_XSAVE: u32 = 0xd;
/// State components of a level-3 guest: x87, SSE, AVX.
const XCR0_AVX: u32 = 0b111;
/// Size of the x87, SSE and AVX areas and the XSAVE header, bytes.
const XSAVE_BYTES_AVX: u32 = 0x340;

const LEAF_KVM: u32 = 0x4000_0000;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
/// KVM features a level keeps: clocksource (old and new), no I/O delay, stable clock.
const KVM_FEATURES: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 24;

/// In leaf 1, ECX.
const VMX: u32 = 1 << 5;
/// In leaf 0x80000001, ECX.
const SVM: u32 = 1 << 2;
/// What SVM offers in detail.
const LEAF_SVM: u32 = 0x8000_000a;

const HTT: u32 = 1 << 28;
const HYPERVISOR: u32 = 1 << 31;

fn part(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    }
}

fn find(entries: &[kvm_cpuid_entry2], function: u32) -> Option<&kvm_cpuid_entry2> {
    entries
        .iter()
        .find(|entry| entry.function == function && entry.index == 0)
}

fn has(entries: &[kvm_cpuid_entry2], feature: &Feature) -> bool {
    let &(function, register, bit, ..) = feature;
    find(entries, function).is_some_and(|entry| part(entry, register) >> bit & 1 == 1)
}

impl Profile {
    /// Its name, as configurations have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::Host => "host",
        }
    }

    fn level(self) -> Option<u8> {
        match self {
            Self::Baseline | Self::V2 => Some(2),
            Self::V3 => Some(3),
            Self::Host => None,
        }
    }

    /// The CPUID of a guest with `vcpus` vCPUs, the same for all of them but for what [`for_vcpu`] fills in.
    pub fn apply(self, supported: &[kvm_cpuid_entry2], vcpus: u32) -> Result<Vec<kvm_cpuid_entry2>, Fault> {
        let Some(level) = self.level() else {
            let entries = supported.iter().filter_map(without_nesting).collect();
            return Ok(with_topology(entries, vcpus));
        };
        let lacking: Vec<&str> = FEATURES
            .iter()
            .filter(|feature| (1..=level).contains(&feature.4) && !has(supported, feature))
            .map(|feature| feature.3)
            .collect();
        if !lacking.is_empty() && self != Self::Baseline {
            let message = format!("this host's KVM lacks {} of the CPU profile", lacking.join(", "));
            return Err(Fault::new(Code::KvmUnusable, message).field("cpu_profile"));
        }
        let entries = supported
            .iter()
            .filter_map(|entry| at_level(entry, level))
            .collect();
        Ok(with_topology(entries, vcpus))
    }
}

/// A leaf without VMX and SVM: no state of a guest's own guests is saved (`KVM_GET_NESTED_STATE`).
fn without_nesting(entry: &kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    let mut entry = *entry;
    match entry.function {
        LEAF_1 => entry.ecx &= !VMX,
        LEAF_EXT => entry.ecx &= !SVM,
        LEAF_SVM => return None,
        _ => {}
    }
    Some(entry)
}

/// What of one leaf a guest of `level` sees; nothing of most leaves.
fn at_level(entry: &kvm_cpuid_entry2, level: u8) -> Option<kvm_cpuid_entry2> {
    let mut entry = *entry;
    let allowed = |register| {
        FEATURES
            .iter()
            .filter(|(function, of, _, _, from)| {
                *function == entry.function && *of == register && *from <= level
            })
            .fold(0u32, |bits, feature| bits | 1 << feature.2)
    };
    match entry.function {
        0 => entry.eax = entry.eax.min(LEAF_XSAVE),
        LEAF_1 => {
            let without_xsave = if level < 3 { !(1 << 27) } else { u32::MAX };
            (entry.ecx, entry.edx) = (entry.ecx & allowed(Ecx) & without_xsave, entry.edx & allowed(Edx));
        }
        2 | 4 | 0x8000_0000 | 0x8000_0002..=0x8000_0006 | 0x8000_001d => {}
        LEAF_7 if entry.index == 0 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, entry.ebx & allowed(Ebx), 0, 0);
        }
        LEAF_XSAVE if level >= 3 && entry.index == 0 => {
            (entry.eax, entry.edx, entry.ecx) = (entry.eax & XCR0_AVX, 0, entry.ecx.min(XSAVE_BYTES_AVX));
        }
        LEAF_XSAVE if level >= 3 && entry.index == 2 => {}
        LEAF_KVM => {}
        LEAF_KVM_FEATURES => (entry.eax, entry.edx) = (entry.eax & KVM_FEATURES, 0),
        LEAF_EXT => {
            entry.ecx &= allowed(Ecx);
            entry.edx &= allowed(Edx) | EXT_EDX_MIRROR;
        }
        // Invariant TSC stays: a guest's TSC is kept true across a move.
        0x8000_0007 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, entry.edx & 1 << 8),
        // Address widths only.
        0x8000_0008 => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
        _ => return None,
    }
    Some(entry)
}

/// Bits of an APIC id that number the CPUs of the one package.
fn package_shift(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// One package of single-thread cores.
fn with_topology(mut entries: Vec<kvm_cpuid_entry2>, vcpus: u32) -> Vec<kvm_cpuid_entry2> {
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_001e));
    for entry in &mut entries {
        match entry.function {
            LEAF_1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | vcpus.next_power_of_two() << 16;
                entry.edx = entry.edx & !HTT | if vcpus > 1 { HTT } else { 0 };
                // Not every KVM lists it among what it supports; without it a guest does not look for KVM's leaves.
                entry.ecx |= HYPERVISOR;
            }
            // No cache is shared between vCPUs, but for the third level, which is shared by all.
            4 | 0x8000_001d => {
                let shared = if entry.eax >> 5 & 7 >= 3 {
                    (1 << package_shift(vcpus)) - 1
                } else {
                    0
                };
                let cores = if entry.function == 4 {
                    ((1 << package_shift(vcpus)) - 1) << 26
                } else {
                    0
                };
                entry.eax = entry.eax & 0x3fff | shared << 14 | cores;
            }
            0x8000_0008 => entry.ecx = package_shift(vcpus) << 12 | (vcpus - 1),
            _ => {}
        }
    }
    // Subleaf 0: threads of a core; subleaf 1: cores of the package; subleaf 2 ends the list.
    for (index, shift, count, kind) in [(0, 0, 1, 1), (1, package_shift(vcpus), vcpus, 2), (2, 0, 0, 0)] {
        entries.push(kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            ..Default::default()
        });
    }
    if let Some(first) = entries.iter_mut().find(|entry| entry.function == 0) {
        first.eax = first.eax.max(0xb);
    }
    entries
}

/// Fills in the APIC id of vCPU `id`.
pub fn for_vcpu(entries: &[kvm_cpuid_entry2], id: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries = entries.to_vec();
    for entry in &mut entries {
        match entry.function {
            LEAF_1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
            0xb => entry.edx = id,
            _ => {}
        }
    }
    entries
}

/// Names of the features that `wanted` has and this host's KVM does not. Bits without a name here are not compared.
pub fn missing(wanted: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Vec<&'static str> {
    // The last two are the guest's own doing or about the number of vCPUs; KVM does not list them.
    FEATURES
        .iter()
        .filter(|feature| has(wanted, feature) && !has(supported, feature))
        .map(|feature| feature.3)
        .filter(|name| {
            !matches!(
                *name,
                "osxsave" | "htt" | "tsc_deadline" | "x2apic" | "hypervisor"
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        [
            0,
            1,
            4,
            6,
            7,
            0xa,
            0xd,
            0x14,
            LEAF_KVM,
            LEAF_KVM_FEATURES,
            0x8000_0001,
            0x8000_0008,
            LEAF_SVM,
        ]
        .map(|function| leaf(function, 0))
        .into_iter()
        .chain([leaf(0xd, 2), leaf(0xd, 9), leaf(0x8000_0007, 0)])
        .collect()
    }

    fn without(feature: &str) -> Vec<kvm_cpuid_entry2> {
        let &(function, register, bit, ..) = FEATURES.iter().find(|f| f.3 == feature).unwrap();
        let mut entries = everything();
        let entry = entries
            .iter_mut()
            .find(|e| e.function == function && e.index == 0)
            .unwrap();
        match register {
            Ebx => entry.ebx &= !(1 << bit),
            Ecx => entry.ecx &= !(1 << bit),
            Edx => entry.edx &= !(1 << bit),
        }
        entries
    }

    #[test]
    fn a_level_shows_its_features_and_no_others() {
        let v2 = Profile::V2.apply(&everything(), 1).unwrap();
        let names = |entries: &[kvm_cpuid_entry2]| -> Vec<_> {
            FEATURES.iter().filter(|f| has(entries, f)).map(|f| f.3).collect()
        };
        assert!(names(&v2).contains(&"sse4_2") && !names(&v2).contains(&"avx2"));
        let aes = 1 << 25;
        assert_eq!(find(&v2, 1).unwrap().ecx & aes, 0);
        assert!(find(&v2, 0xa).is_none() && find(&v2, 0x14).is_none());
        assert_eq!(find(&v2, LEAF_KVM_FEATURES).unwrap().eax, KVM_FEATURES);
        let v3 = Profile::V3.apply(&everything(), 1).unwrap();
        assert!(names(&v3).contains(&"avx2"));
        assert_eq!(find(&v3, 0xd).unwrap().eax, XCR0_AVX);
        assert!(!v3.iter().any(|entry| entry.function == 0xd && entry.index == 9));
    }

    #[test]
    fn no_profile_shows_nested_virtualization() {
        for profile in [Profile::Baseline, Profile::V2, Profile::V3, Profile::Host] {
            let entries = profile.apply(&everything(), 1).unwrap();
            let ecx = |leaf| find(&entries, leaf).unwrap().ecx;
            assert_eq!((ecx(LEAF_1) & VMX, ecx(LEAF_EXT) & SVM), (0, 0), "{profile:?}");
            assert!(find(&entries, LEAF_SVM).is_none(), "{profile:?}");
        }
        let host = Profile::Host.apply(&everything(), 1).unwrap();
        assert_eq!(find(&host, LEAF_1).unwrap().ecx, !VMX, "all else is shown");
    }

    #[test]
    fn a_level_the_host_cannot_give_is_refused_by_name_but_baseline_does_without() {
        let fault = Profile::V2.apply(&without("cx16"), 1).unwrap_err();
        assert_eq!(fault.code, Code::KvmUnusable);
        assert!(fault.message.contains("cx16"), "{}", fault.message);
        let baseline = Profile::Baseline.apply(&without("cx16"), 1).unwrap();
        assert_eq!(find(&baseline, 1).unwrap().ecx & 1 << 13, 0);
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_in_one_package() {
        let all = Profile::V2.apply(&everything(), 3).unwrap();
        for id in 0..3 {
            let one = for_vcpu(&all, id);
            let leaf_1 = find(&one, 1).unwrap();
            assert_eq!((leaf_1.ebx >> 24, leaf_1.ebx >> 16 & 0xff), (id, 4));
            let cores = one.iter().find(|e| e.function == 0xb && e.index == 1).unwrap();
            assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 3, id));
        }
        assert_eq!(
            find(&Profile::Host.apply(&everything(), 1).unwrap(), 1)
                .unwrap()
                .edx
                & HTT,
            0
        );
    }

    #[test]
    fn what_a_received_guest_uses_and_the_host_lacks_is_named() {
        assert_eq!(missing(&everything(), &without("avx2")), ["avx2"]);
        assert!(missing(&without("avx2"), &everything()).is_empty());
        assert!(missing(&everything(), &without("osxsave")).is_empty());
    }
}
