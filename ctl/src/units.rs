//! Sizes, lengths of time and instants, as people type them and as they read them.
//!
//! Sizes are binary: `256MiB`, `256M` and `256mib` are the same. A length of time always names its unit, because
//! a bare `300` would be a guess between seconds and milliseconds.

use std::time::Duration;

use time::OffsetDateTime;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Splits `text` into its number and its unit.
fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

/// Parses a size in MiB: `256`, `256MiB`, `1GiB`, `1TiB`, the `iB` optional, any case.
pub fn parse_mib(text: &str) -> Result<u64, String> {
    let help =
        || format!("\"{text}\" is not a size: a whole number of MiB, or one with a unit, as 256MiB or 1GiB");
    let (number, unit) = split(text);
    let number: u64 = number.parse().map_err(|_| help())?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "m" | "mib" => 1,
        "g" | "gib" => 1 << 10,
        "t" | "tib" => 1 << 20,
        _ => return Err(help()),
    };
    number.checked_mul(factor).filter(|&mib| mib > 0).ok_or_else(help)
}

/// Parses a bandwidth in MiB a second: a size, with or without `/s`.
pub fn parse_bandwidth(text: &str) -> Result<u64, String> {
    let bare = text.trim().strip_suffix("/s").unwrap_or(text);
    parse_mib(bare).map_err(|_| {
        format!("\"{text}\" is not a bandwidth: MiB a second, as 500MiB or 1GiB (with or without /s)")
    })
}

/// A whole number of `least` to `most`, or `what` is wrong with it.
fn parse_within(text: &str, number: &str, least: u32, most: u32, what: &str) -> Result<u32, String> {
    number
        .parse()
        .ok()
        .filter(|value| (least..=most).contains(value))
        .ok_or_else(|| format!("\"{text}\" is not {what}: a whole number from {least} to {most}"))
}

/// Parses a share of time: `90` or `90%`.
pub fn parse_percent(text: &str) -> Result<u32, String> {
    let bare = text.trim();
    let bare = bare.strip_suffix('%').unwrap_or(bare);
    parse_within(text, bare, 1, 99, "a percentage")
}

/// Parses a number of TCP streams.
pub fn parse_streams(text: &str) -> Result<u32, String> {
    parse_within(text, text.trim(), 1, 16, "a number of streams")
}

/// Parses a length of time: `300ms`, `60s`, `5m`, `1h`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let help = || {
        format!("\"{text}\" is not a length of time: a whole number and its unit, as 300ms, 60s, 5m or 1h")
    };
    let (number, unit) = split(text);
    let number: u64 = number.parse().map_err(|_| help())?;
    let ms_per_unit = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err(help()),
    };
    number
        .checked_mul(ms_per_unit)
        .filter(|&ms| ms > 0)
        .map(Duration::from_millis)
        .ok_or_else(help)
}

/// The quotient to the nearest tenth: `1536, 1024` gives `1.5`.
fn one_decimal(value: u64, unit: u64) -> String {
    let unit = u128::from(unit);
    let tenths = (u128::from(value) * 10 + unit / 2) / unit;
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// A number of bytes for people.
pub fn bytes(value: u64) -> String {
    match value {
        GIB.. => format!("{} GiB", one_decimal(value, GIB)),
        MIB.. => format!("{} MiB", one_decimal(value, MIB)),
        KIB.. => format!("{} KiB", one_decimal(value, KIB)),
        _ => format!("{value} B"),
    }
}

/// Microseconds for people.
pub fn micros(value: u64) -> String {
    match value {
        1_000_000.. => format!("{} s", one_decimal(value, 1_000_000)),
        1_000.. => format!("{} ms", one_decimal(value, 1_000)),
        _ => format!("{value} µs"),
    }
}

/// Milliseconds for people.
pub fn millis(value: u64) -> String {
    match value {
        60_000.. => format!("{}m{:02}s", value / 60_000, value % 60_000 / 1_000),
        1_000.. => format!("{} s", one_decimal(value, 1_000)),
        _ => format!("{value} ms"),
    }
}

/// Unix milliseconds as a UTC instant, RFC 3339 to the millisecond; empty for 0, which means "never".
pub fn instant(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return String::new();
    }
    match OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms) * 1_000_000) {
        Ok(at) => format!(
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
            at.year(),
            u8::from(at.month()),
            at.day(),
            at.hour(),
            at.minute(),
            at.second(),
            at.millisecond()
        ),
        Err(_) => format!("{unix_ms} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_size_is_mib_and_units_are_binary() {
        assert_eq!(parse_mib("256"), Ok(256));
        assert_eq!(parse_mib("256MiB"), Ok(256));
        assert_eq!(parse_mib("1GiB"), Ok(1024));
        assert_eq!(parse_mib("2g"), Ok(2048));
        assert_eq!(parse_mib(" 1 TiB "), Ok(1 << 20));
    }

    #[test]
    fn sizes_that_are_none_are_refused_with_an_example() {
        for text in [
            "",
            "MiB",
            "0",
            "-1",
            "1.5GiB",
            "12KiB",
            "99999999999999999999",
            "18446744073709551615TiB",
        ] {
            let error = parse_mib(text).unwrap_err();
            assert!(error.contains(text) && error.contains("1GiB"), "{error}");
        }
    }

    #[test]
    fn a_bandwidth_may_say_per_second() {
        assert_eq!(parse_bandwidth("500MiB"), Ok(500));
        assert_eq!(parse_bandwidth("1GiB/s"), Ok(1024));
        assert!(parse_bandwidth("fast").unwrap_err().contains("500MiB"));
    }

    #[test]
    fn a_length_of_time_must_name_its_unit() {
        assert_eq!(parse_duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(parse_duration("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("1h"), Ok(Duration::from_secs(3600)));
        for text in ["300", "s", "0s", "1d", "-1s"] {
            assert!(parse_duration(text).unwrap_err().contains("300ms"), "{text}");
        }
    }

    #[test]
    fn percentages_and_numbers_of_streams_are_refused_with_what_is_possible() {
        assert_eq!((parse_percent("1"), parse_percent("99%")), (Ok(1), Ok(99)));
        assert_eq!((parse_streams("1"), parse_streams("16")), (Ok(1), Ok(16)));
        for text in ["0", "100", "-1", "half", "", "1.5", "99999999999"] {
            let error = parse_percent(text).unwrap_err();
            assert!(
                error.contains(&format!("\"{text}\"")) && error.contains("1 to 99"),
                "{error}"
            );
        }
        for text in ["0", "17", "auto"] {
            assert!(parse_streams(text).unwrap_err().contains("1 to 16"), "{text}");
        }
    }

    #[test]
    fn numbers_read_well_at_every_size() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(64 * MIB), "64.0 MiB");
        assert_eq!(bytes(u64::MAX), "17179869184.0 GiB");
        assert_eq!(micros(999), "999 µs");
        assert_eq!(micros(12_345), "12.3 ms");
        assert_eq!(millis(1_250), "1.3 s");
        assert_eq!(millis(61_000), "1m01s");
    }

    #[test]
    fn instants_are_utc_and_zero_is_never() {
        assert_eq!(instant(0), "");
        assert_eq!(instant(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
        assert_eq!(instant(1_700_000_000_000), "2023-11-14T22:13:20.000Z");
        assert_eq!(instant(u64::MAX), format!("{} ms", u64::MAX));
    }
}
