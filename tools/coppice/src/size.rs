//! Sizes as people type and read them.

use std::str::FromStr;

/// A size in bytes, typed as bytes or with a binary unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

const UNITS: [(&str, u32); 5] = [("B", 0), ("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim_start();
        let shift = if unit.is_empty() {
            0
        } else {
            let known = UNITS.iter().find(|(name, _)| *name == unit);
            known.ok_or("write bytes, or a whole number with KiB, MiB, GiB or TiB")?.1
        };
        let number: u64 = number.parse().map_err(|_| "not a whole number".to_owned())?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(|| "too large".to_owned())
    }
}

/// `bytes` in the largest unit that leaves at least one whole, one decimal.
pub fn human(bytes: u64) -> String {
    let (name, shift) = UNITS.iter().rev().find(|(_, shift)| bytes >> shift > 0).copied().unwrap_or(("B", 0));
    let whole = bytes >> shift;
    let rest = bytes - (whole << shift);
    if rest == 0 {
        return format!("{whole} {name}");
    }
    // Below 1 TiB of rest the tenfold fits; rounding down never shows "1024".
    let tenth = (rest * 10) >> shift;
    format!("{whole}.{tenth} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_typed() {
        for (text, bytes) in
            [("512", 512), ("1KiB", 1024), ("3 MiB", 3 << 20), ("1GiB", 1 << 30), ("2TiB", 2 << 40)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "1G", "-1", "1.5GiB", "99999999TiB", "MiB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_print_short() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1 << 30), "1 GiB");
        assert_eq!(human((1 << 20) + (1 << 19)), "1.5 MiB");
        assert_eq!(human(1023), "1023 B");
    }
}
