//! The kernel command line: what to own, how to write to it, and how to fail on purpose.
//!
//! Words are `name=value`, separated by blanks; the last one of a name counts. An unknown name is an error, so that a misspelt parameter never
//! runs a different experiment than the one asked for; `console=…` alone is ignored, since loaders add it.

use core::fmt;

use crate::frames::{FRAME_MAX, FRAME_MIN};
use crate::load::DEPTH_MAX;
use crate::{CPUS_MAX, PAGE_SIZE};

/// Slowest and fastest timer: below, a console line could miss its second; above, KVM slows the timer down itself.
pub const HZ_RANGE: core::ops::RangeInclusive<u64> = 10..=4000;
/// Most pages a second that can be asked for; more is what `rate=max` is for.
pub const RATE_MAX: u64 = 100_000_000;
/// Longest wait before a fault, seconds: a day.
pub const FAULT_AFTER_MAX_S: u64 = 86_400;

const OWN_DEFAULT: u64 = 64 << 20;
const DEPTH_DEFAULT: u32 = 32;

/// How fast hot pages are rewritten, all processors together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// As fast as the processors can.
    Max,
    /// So many pages a second; 0 only verifies.
    PagesPerSecond(u64),
}

/// The order in which hot pages are rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other, round and round.
    Sequential,
    /// Each with the same chance.
    Uniform,
    /// The k-th most popular page with a chance close to 1/k.
    Zipf,
}

/// What a page's body holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros; a page that was never hot is wholly zero, header included.
    Zero,
    /// One word, another one at each write, repeated.
    Repeat,
    /// Words that do not compress.
    Random,
}

/// A way to end the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A triple fault.
    Triple,
    /// An instruction that KVM cannot emulate.
    Emulation,
    /// An orderly power-off through the ACPI PM1a register.
    Shutdown,
}

/// The load of a benchmark on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskBench {
    /// Requests under way, all the time.
    pub depth: u32,
    /// How many of them write, percent; the others read.
    pub writes_percent: u32,
}

/// The load of a benchmark on a NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetBench {
    /// Frames are taken and counted; else they are sent.
    pub sink: bool,
    /// Bytes of a frame that is sent, without its checksum.
    pub frame_bytes: u32,
}

/// A valid command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Pages that carry a number, a sequence and a checksum.
    pub own_pages: u64,
    /// How many of them are rewritten; the others are written once.
    pub hot_pages: u64,
    /// How fast.
    pub rate: Rate,
    /// In which order.
    pub pattern: Pattern,
    /// With what.
    pub content: Content,
    /// Processors to bring up; `None` takes all that answer.
    pub cpus: Option<u32>,
    /// Timer ticks a second on each processor.
    pub hz: u32,
    /// Whether to keep a journal on a disk.
    pub disk: bool,
    /// The IPv4 address that a station on a NIC answers for, where there is to be one.
    pub net: Option<[u8; 4]>,
    /// Whether that disk may come and go.
    pub hot_plug: bool,
    /// Whether to fill a balloon from pages that nobody owns.
    pub balloon: bool,
    /// And to report those free that are not in it.
    pub reports: bool,
    /// Whether pages that nobody owns are written to first.
    pub spare_written: bool,
    /// Whether the NIC of a station may come and go.
    pub net_hot_plug: bool,
    /// Whether the console is a virtio device once the guest is up.
    pub virtio_console: bool,
    /// The load on a disk, instead of a journal.
    pub disk_bench: Option<DiskBench>,
    /// The load on a NIC, instead of a station.
    pub net_bench: Option<NetBench>,
    /// How to end, and after how many seconds.
    pub fault: Option<(Fault, u64)>,
}

/// A word of the command line that cannot be followed, and what would be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadParam<'a> {
    /// The word as it was given.
    pub word: &'a str,
    /// What is wrong with it.
    pub why: Why,
}

/// What is wrong with a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No such name.
    Unknown,
    /// Not one of these words.
    NotOneOf(&'static str),
    /// Not a number, or outside these bounds.
    OutOfRange {
        /// Lowest allowed.
        low: u64,
        /// Highest allowed.
        high: u64,
    },
    /// Not a size in whole pages.
    NotASize,
    /// More hot pages than owned ones.
    HotAboveOwn {
        /// Pages owned.
        own_pages: u64,
    },
    /// Fewer pages than processors.
    FewerThanCpus {
        /// Processors asked for.
        cpus: u32,
    },
    /// `fault_after` alone.
    WithoutFault,
    /// Not an IPv4 address.
    NotAnAddress,
    /// `net` alone, or `ip` alone.
    NetAndIp,
    /// A word that only goes with this one.
    GoesWith(&'static str),
    /// The machine has less memory.
    DoesNotFit {
        /// Pages that the machine could give.
        pages: u64,
    },
}

impl fmt::Display for BadParam<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "probe bad parameter \"{}\": ", self.word)?;
        match self.why {
            Why::Unknown => f.write_str(
                "unknown name, known are own, hot, rate, pattern, content, cpus, hz, disk, depth, writes, net, ip, frame, balloon, spare, fault, fault_after",
            ),
            Why::NotOneOf(words) => write!(f, "must be one of {words}"),
            Why::OutOfRange { low, high } => write!(f, "must be a number from {low} to {high}"),
            Why::NotASize => {
                f.write_str("must be a size of at least one page in whole pages of 4096 bytes, such as 64M")
            }
            Why::HotAboveOwn { own_pages } => write!(f, "is more than the {own_pages} pages owned"),
            Why::FewerThanCpus { cpus } => {
                write!(f, "is fewer pages than the {cpus} processors need, one each")
            }
            Why::WithoutFault => f.write_str("needs fault=triple, emulation or shutdown"),
            Why::NotAnAddress => f.write_str("must be an IPv4 address such as 10.0.0.2"),
            Why::NetAndIp => f.write_str("net=echo or hot-plug and ip=ADDRESS need each other"),
            Why::GoesWith(word) => write!(f, "goes with {word} only"),
            Why::DoesNotFit { pages } => write!(f, "does not fit, the memory map has room for {pages} pages"),
        }
    }
}

impl Params {
    /// Reads a command line.
    ///
    /// # Errors
    /// The first word that cannot be followed.
    pub fn parse(line: &str) -> Result<Params, BadParam<'_>> {
        let mut params = Params {
            own_pages: OWN_DEFAULT / PAGE_SIZE,
            hot_pages: 0,
            rate: Rate::Max,
            pattern: Pattern::Sequential,
            content: Content::Random,
            cpus: None,
            hz: 1000,
            disk: false,
            net: None,
            hot_plug: false,
            balloon: false,
            reports: false,
            spare_written: false,
            net_hot_plug: false,
            virtio_console: false,
            disk_bench: None,
            net_bench: None,
            fault: None,
        };
        let mut hot_word = None;
        let mut fault = None;
        let mut fault_after = None;
        let (mut net, mut ip) = (None, None);
        let mut bench = Bench::default();
        for word in line.split_ascii_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let bad = |why| BadParam { word, why };
            match name {
                "own" => params.own_pages = pages(value).ok_or(bad(Why::NotASize))?,
                "hot" => hot_word = Some((word, pages(value).ok_or(bad(Why::NotASize))?)),
                "rate" => params.rate = rate(value).map_err(bad)?,
                "pattern" => params.pattern = pattern(value).map_err(bad)?,
                "content" => params.content = content(value).map_err(bad)?,
                "cpus" => params.cpus = Some(number32(value, 1, CPUS_MAX).map_err(bad)?),
                "hz" => {
                    let hz = number(value, *HZ_RANGE.start(), *HZ_RANGE.end()).map_err(bad)?;
                    params.hz = u32::try_from(hz).unwrap_or(u32::MAX);
                }
                "balloon" => (params.balloon, params.reports) = balloon(value).map_err(bad)?,
                "spare" => params.spare_written = spare(value).map_err(bad)?,
                "disk" => {
                    bench.disk = value == "bench";
                    (params.disk, params.hot_plug) = journal(value).map_err(bad)?;
                }
                "depth" => bench.depth = Some((word, number32(value, 1, DEPTH_MAX).map_err(bad)?)),
                "writes" => bench.writes = Some((word, number32(value, 0, 100).map_err(bad)?)),
                "net" => {
                    bench.sink = match value {
                        "flood" => Some(false),
                        "sink" => Some(true),
                        _ => None,
                    };
                    let there;
                    (there, params.net_hot_plug) = station(value).map_err(bad)?;
                    net = there.then_some(word);
                }
                "frame" => {
                    let frame = number32(value, FRAME_MIN as u32, FRAME_MAX as u32).map_err(bad)?;
                    bench.frame = Some((word, frame));
                }
                "ip" => ip = Some((word, address(value).ok_or(bad(Why::NotAnAddress))?)),
                "fault" => fault = Some(fault_kind(value).map_err(bad)?),
                "fault_after" => {
                    fault_after = Some((word, number(value, 0, FAULT_AFTER_MAX_S).map_err(bad)?))
                }
                "console" => params.virtio_console = value == "virtio",
                _ => return Err(bad(Why::Unknown)),
            }
        }
        params.hot_pages = hot_word.map_or(params.own_pages, |(_, pages)| pages);
        if let Some((word, _)) = hot_word
            && params.hot_pages > params.own_pages
        {
            return Err(BadParam {
                word,
                why: Why::HotAboveOwn {
                    own_pages: params.own_pages,
                },
            });
        }
        params.net = match (net, ip) {
            (Some(_), Some((_, ip))) => Some(ip),
            (None, None) => None,
            (Some(word), None) | (None, Some((word, _))) => {
                return Err(BadParam {
                    word,
                    why: Why::NetAndIp,
                });
            }
        };
        params.fault = match (fault, fault_after) {
            (Some(fault), after) => Some((fault, after.map_or(0, |(_, seconds)| seconds))),
            (None, Some((word, _))) => {
                return Err(BadParam {
                    word,
                    why: Why::WithoutFault,
                });
            }
            (None, None) => None,
        };
        (params.disk_bench, params.net_bench) = bench.finish()?;
        params.check_cpus(hot_word.map_or("hot", |(word, _)| word))?;
        Ok(params)
    }

    fn check_cpus<'a>(&self, word: &'a str) -> Result<(), BadParam<'a>> {
        match self.cpus {
            Some(cpus) if u64::from(cpus) > self.hot_pages => Err(BadParam {
                word,
                why: Why::FewerThanCpus { cpus },
            }),
            _ => Ok(()),
        }
    }
}

/// The words of a benchmark, as far as they were read.
#[derive(Default)]
struct Bench<'a> {
    disk: bool,
    depth: Option<(&'a str, u32)>,
    writes: Option<(&'a str, u32)>,
    sink: Option<bool>,
    frame: Option<(&'a str, u32)>,
}

impl<'a> Bench<'a> {
    fn finish(self) -> Result<(Option<DiskBench>, Option<NetBench>), BadParam<'a>> {
        let alone = |given: Option<(&'a str, u32)>, with| match given {
            Some((word, _)) => Err(BadParam {
                word,
                why: Why::GoesWith(with),
            }),
            None => Ok(()),
        };
        if !self.disk {
            alone(self.depth, "disk=bench")?;
            alone(self.writes, "disk=bench")?;
        }
        if self.sink != Some(false) {
            alone(self.frame, "net=flood")?;
        }
        let value = |given: Option<(&str, u32)>, otherwise| given.map_or(otherwise, |(_, value)| value);
        let disk = self.disk.then(|| DiskBench {
            depth: value(self.depth, DEPTH_DEFAULT),
            writes_percent: value(self.writes, 0),
        });
        let net = self.sink.map(|sink| NetBench {
            sink,
            frame_bytes: value(self.frame, FRAME_MAX as u32),
        });
        Ok((disk, net))
    }
}

/// Bytes with an optional K, M or G, as whole pages.
fn pages(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let bytes = digits.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    (bytes > 0 && bytes.is_multiple_of(PAGE_SIZE)).then_some(bytes / PAGE_SIZE)
}

fn number(text: &str, low: u64, high: u64) -> Result<u64, Why> {
    match text.parse::<u64>() {
        Ok(value) if (low..=high).contains(&value) => Ok(value),
        _ => Err(Why::OutOfRange { low, high }),
    }
}

fn number32(text: &str, low: u32, high: u32) -> Result<u32, Why> {
    match text.parse::<u32>() {
        Ok(value) if (low..=high).contains(&value) => Ok(value),
        _ => Err(Why::OutOfRange {
            low: u64::from(low),
            high: u64::from(high),
        }),
    }
}

fn rate(text: &str) -> Result<Rate, Why> {
    match text {
        "max" => Ok(Rate::Max),
        _ => match text.parse::<u64>() {
            Ok(pages) if pages <= RATE_MAX => Ok(Rate::PagesPerSecond(pages)),
            _ => Err(Why::NotOneOf("max, or pages a second from 0 to 100000000")),
        },
    }
}

fn pattern(text: &str) -> Result<Pattern, Why> {
    match text {
        "sequential" => Ok(Pattern::Sequential),
        "uniform" => Ok(Pattern::Uniform),
        "zipf" => Ok(Pattern::Zipf),
        _ => Err(Why::NotOneOf("sequential, uniform, zipf")),
    }
}

fn content(text: &str) -> Result<Content, Why> {
    match text {
        "zero" => Ok(Content::Zero),
        "repeat" => Ok(Content::Repeat),
        "random" => Ok(Content::Random),
        _ => Err(Why::NotOneOf("zero, repeat, random")),
    }
}

/// Whether there is to be a journal, and whether its disk may come and go.
fn journal(text: &str) -> Result<(bool, bool), Why> {
    match text {
        "none" | "bench" => Ok((false, false)),
        "journal" => Ok((true, false)),
        "hot-plug" => Ok((true, true)),
        _ => Err(Why::NotOneOf("none, journal, hot-plug, bench")),
    }
}

/// Whether there is to be a balloon, and whether free pages are reported.
fn balloon(text: &str) -> Result<(bool, bool), Why> {
    match text {
        "none" => Ok((false, false)),
        "quiet" => Ok((true, false)),
        "on" => Ok((true, true)),
        _ => Err(Why::NotOneOf("none, on, quiet")),
    }
}

fn spare(text: &str) -> Result<bool, Why> {
    match text {
        "untouched" => Ok(false),
        "written" => Ok(true),
        _ => Err(Why::NotOneOf("untouched, written")),
    }
}

/// Whether there is to be a NIC, and whether it may come and go.
fn station(text: &str) -> Result<(bool, bool), Why> {
    match text {
        "none" | "flood" | "sink" => Ok((false, false)),
        "echo" => Ok((true, false)),
        "hot-plug" => Ok((true, true)),
        _ => Err(Why::NotOneOf("none, echo, hot-plug, flood, sink")),
    }
}

fn address(text: &str) -> Option<[u8; 4]> {
    let mut ip = [0; 4];
    let mut words = text.split('.');
    for byte in &mut ip {
        *byte = words.next()?.parse().ok()?;
    }
    words.next().is_none().then_some(ip)
}

fn fault_kind(text: &str) -> Result<Fault, Why> {
    match text {
        "triple" => Ok(Fault::Triple),
        "emulation" => Ok(Fault::Emulation),
        "shutdown" => Ok(Fault::Shutdown),
        _ => Err(Why::NotOneOf("triple, emulation, shutdown")),
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn an_empty_line_owns_64_mib_all_of_it_hot() {
        let params = Params::parse("").unwrap();
        assert_eq!(
            (params.own_pages, params.hot_pages, params.hz, params.cpus),
            (16384, 16384, 1000, None)
        );
        assert_eq!(params.rate, Rate::Max);
    }

    #[test]
    fn every_parameter_is_followed() {
        let line = "console=ttyS0 own=1G hot=256K rate=500 pattern=zipf content=repeat cpus=2 hz=100 disk=journal net=echo ip=10.0.0.2 balloon=on spare=written fault=triple fault_after=3";
        let expected = Params {
            own_pages: 262_144,
            hot_pages: 64,
            rate: Rate::PagesPerSecond(500),
            pattern: Pattern::Zipf,
            content: Content::Repeat,
            cpus: Some(2),
            hz: 100,
            disk: true,
            net: Some([10, 0, 0, 2]),
            hot_plug: false,
            balloon: true,
            reports: true,
            spare_written: true,
            net_hot_plug: false,
            virtio_console: false,
            disk_bench: None,
            net_bench: None,
            fault: Some((Fault::Triple, 3)),
        };
        assert_eq!(Params::parse(line), Ok(expected));
    }

    #[test]
    fn each_bad_word_is_named_with_what_would_be_right() {
        let cases = [
            ("own=0", "own=0", "at least one page"),
            ("own=5000", "own=5000", "whole pages"),
            (
                "own=99999999999999999999",
                "own=99999999999999999999",
                "must be a size",
            ),
            (
                "own=18446744073709551615G",
                "own=18446744073709551615G",
                "must be a size",
            ),
            ("own=", "own=", "must be a size"),
            ("hot=65M", "hot=65M", "more than the 16384 pages owned"),
            ("hot=4K cpus=2", "hot=4K", "2 processors"),
            ("rate=fast", "rate=fast", "must be one of max"),
            ("rate=-1", "rate=-1", "must be one of max"),
            ("pattern=zip", "pattern=zip", "sequential, uniform, zipf"),
            ("content=x", "content=x", "zero, repeat, random"),
            ("cpus=0", "cpus=0", "from 1 to 16"),
            ("cpus=17", "cpus=17", "from 1 to 16"),
            ("hz=9", "hz=9", "from 10 to 4000"),
            ("fault=quad", "fault=quad", "triple, emulation, shutdown"),
            ("balloon=yes", "balloon=yes", "none, on, quiet"),
            ("spare=no", "spare=no", "untouched, written"),
            ("disk=sda", "disk=sda", "none, journal, hot-plug, bench"),
            ("disk=bench depth=0", "depth=0", "from 1 to 64"),
            ("disk=bench writes=101", "writes=101", "from 0 to 100"),
            ("disk=journal depth=2", "depth=2", "goes with disk=bench"),
            ("writes=2", "writes=2", "goes with disk=bench"),
            ("net=sink frame=60", "frame=60", "goes with net=flood"),
            ("net=flood frame=59", "frame=59", "from 60 to 1514"),
            ("net=flood ip=10.0.0.2", "ip=10.0.0.2", "need each other"),
            ("net=on", "net=on", "none, echo, hot-plug, flood, sink"),
            ("net=echo", "net=echo", "need each other"),
            ("ip=10.0.0.2", "ip=10.0.0.2", "need each other"),
            ("net=echo ip=10.0.0", "ip=10.0.0", "an IPv4 address"),
            ("net=echo ip=10.0.0.256", "ip=10.0.0.256", "an IPv4 address"),
            ("net=echo ip=10.0.0.2.1", "ip=10.0.0.2.1", "an IPv4 address"),
            ("fault_after=1", "fault_after=1", "needs fault="),
            ("own=64M patern=zipf", "patern=zipf", "unknown name"),
            ("quiet", "quiet", "unknown name"),
        ];
        for (line, word, part) in cases {
            let bad = Params::parse(line).unwrap_err();
            assert_eq!(bad.word, word, "{line}");
            let text = bad.to_string();
            assert!(
                text.starts_with("probe bad parameter ") && text.contains(part),
                "{line}: {text}"
            );
        }
    }

    #[test]
    fn a_load_has_its_defaults_and_takes_the_place_of_journal_and_station() {
        let params = Params::parse("disk=bench net=flood").unwrap();
        let disk = DiskBench {
            depth: 32,
            writes_percent: 0,
        };
        let net = NetBench {
            sink: false,
            frame_bytes: 1514,
        };
        assert_eq!((params.disk_bench, params.net_bench), (Some(disk), Some(net)));
        assert_eq!((params.disk, params.net), (false, None));
        let params = Params::parse("disk=bench depth=64 writes=30 net=sink").unwrap();
        assert_eq!(params.disk_bench.map(|bench| bench.writes_percent), Some(30));
        assert!(params.net_bench.is_some_and(|bench| bench.sink));
        assert_eq!(Params::parse("disk=bench disk=none").unwrap().disk_bench, None);
    }

    #[test]
    fn the_last_word_of_a_name_counts() {
        assert_eq!(Params::parse("hz=100 hz=200").unwrap().hz, 200);
        assert!(
            Params::parse("console=ttyS0 console=virtio")
                .unwrap()
                .virtio_console
        );
        let params = Params::parse("net=hot-plug ip=10.0.0.2").unwrap();
        assert_eq!((params.net, params.net_hot_plug), (Some([10, 0, 0, 2]), true));
        assert!(
            !Params::parse("net=hot-plug net=echo ip=10.0.0.2")
                .unwrap()
                .net_hot_plug
        );
    }
}
