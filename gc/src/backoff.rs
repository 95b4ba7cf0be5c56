//! Merges step back when guests feel them: a controller without clock or I/O.
//!
//! Each disk has a calm latency, learned while nothing merges. While something
//! does, and some disk is slower than its calm latency times the set factor,
//! the rate allowed is halved, from what was really moved; when all are well
//! again it grows back. It never falls under [`limits::BACKOFF_FLOOR`]: a
//! merge always ends, and ending it is what makes reads fast again.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::limits;

/// What was seen of one disk in one interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// Which disk.
    pub vdi: Uuid,
    /// Requests answered.
    pub requests: u64,
    /// Their mean time, in microseconds.
    pub mean_us: f64,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Backoff {
    /// Calm latencies, in microseconds.
    calm_us: BTreeMap<Uuid, f64>,
    /// Bytes per second allowed; `None` is no limit.
    limit: Option<u64>,
}

impl Backoff {
    /// The rate allowed now, in bytes per second.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Takes in one interval. `moved` is what merges copied in it, in bytes
    /// per second; `None` if none ran. `factor` 0 switches this off.
    pub fn observe(&mut self, seen: &[Seen], moved: Option<u64>, factor: f64) {
        self.calm_us.retain(|vdi, _| seen.iter().any(|one| one.vdi == *vdi));
        if factor <= 0.0 {
            self.limit = None;
            return;
        }
        let Some(moved) = moved else {
            self.limit = None;
            seen.iter().for_each(|one| self.learn(one));
            return;
        };
        if seen.iter().any(|one| self.suffers(one, factor)) {
            let now = self.limit.map_or(moved, |limit| limit.min(moved));
            self.limit = Some((now / 2).max(limits::BACKOFF_FLOOR));
        } else {
            let grown = |limit: u64| limit.saturating_add(limit / 4);
            self.limit = self.limit.map(grown).filter(|limit| *limit < limits::BACKOFF_CEILING);
        }
    }

    /// Old values fade slowly: a calm hour is remembered through a busy minute.
    fn learn(&mut self, one: &Seen) {
        if one.requests >= limits::BACKOFF_REQUESTS_MIN {
            let calm = self.calm_us.entry(one.vdi).or_insert(one.mean_us);
            *calm += (one.mean_us - *calm) / 8.0;
        }
    }

    /// A disk that was attached under a merge has no calm latency yet: then
    /// only what nobody notices is sure to be fine.
    fn suffers(&self, one: &Seen, factor: f64) -> bool {
        let calm = self.calm_us.get(&one.vdi).copied().unwrap_or(0.0);
        one.requests >= limits::BACKOFF_REQUESTS_MIN
            && one.mean_us > (calm * factor).max(limits::BACKOFF_FREE_US)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);
    const MIB: u64 = 1 << 20;

    fn seen(vdi: Uuid, ms: f64) -> Seen {
        Seen { vdi, requests: 1000, mean_us: ms * 1000.0 }
    }

    /// What a controller that knows both disks at 2 ms allows after a table
    /// of (first disk's ms, other disk's ms, MiB/s moved).
    fn allowed(factor: f64, table: &[(f64, f64, u64)]) -> Option<u64> {
        let mut backoff = Backoff::default();
        backoff.observe(&[seen(DISK, 2.0), seen(OTHER, 2.0)], None, factor);
        for (first, other, moved) in table {
            backoff.observe(&[seen(DISK, *first), seen(OTHER, *other)], Some(moved * MIB), factor);
        }
        backoff.limit().map(|limit| limit / MIB)
    }

    #[test]
    fn the_table() {
        type Case<'a> = (f64, &'a [(f64, f64, u64)], Option<u64>);
        let cases: [Case<'_>; 9] = [
            // All is well: no limit.
            (4.0, &[(2.0, 2.0, 400), (7.9, 2.0, 400)], None),
            // Either disk is enough, and what was moved is halved.
            (4.0, &[(9.0, 2.0, 400)], Some(200)),
            (4.0, &[(2.0, 9.0, 400)], Some(200)),
            (4.0, &[(9.0, 2.0, 400), (9.0, 2.0, 200)], Some(100)),
            // A merge that was slower than allowed is halved from there.
            (4.0, &[(9.0, 2.0, 400), (9.0, 2.0, 100)], Some(50)),
            // It never stops.
            (4.0, &[(99.0, 2.0, 20), (99.0, 2.0, 16), (99.0, 2.0, 16)], Some(16)),
            // Well again: it grows, and then there is no limit.
            (4.0, &[(9.0, 2.0, 400), (3.0, 2.0, 200)], Some(250)),
            (2.0, &[(5.1, 2.0, 6400), (2.0, 2.0, 3200), (2.0, 2.0, 4000), (2.0, 2.0, 4096)], None),
            // Switched off.
            (0.0, &[(99.0, 99.0, 400)], None),
        ];
        for (factor, table, wanted) in cases {
            assert_eq!(allowed(factor, table), wanted, "{factor} {table:?}");
        }
    }

    #[test]
    fn what_nobody_notices_does_not_count() {
        let mut backoff = Backoff::default();
        backoff.observe(&[seen(DISK, 0.05)], None, 2.0);
        // A hundred times slower than calm, and still under 5 ms.
        backoff.observe(&[seen(DISK, 4.9)], Some(400 * MIB), 2.0);
        assert_eq!(backoff.limit(), None);
        // Few requests tell nothing.
        let few = Seen { vdi: DISK, requests: 3, mean_us: 1e6 };
        backoff.observe(&[few], Some(400 * MIB), 2.0);
        assert_eq!(backoff.limit(), None);
    }

    #[test]
    fn the_limit_ends_with_the_merge_and_calm_is_learned_only_then() {
        let mut backoff = Backoff::default();
        backoff.observe(&[seen(DISK, 2.0)], None, 4.0);
        for _ in 0..100 {
            backoff.observe(&[seen(DISK, 50.0)], Some(100 * MIB), 4.0);
        }
        assert_eq!(backoff.limit(), Some(limits::BACKOFF_FLOOR));
        backoff.observe(&[seen(DISK, 2.0)], None, 4.0);
        assert_eq!(backoff.limit(), None);
        backoff.observe(&[seen(DISK, 9.0)], Some(100 * MIB), 4.0);
        assert!(backoff.limit().is_some(), "it took the merge's latency for calm");
    }
}
