//! What can be set for an SR, and what of it is refused.

use serde::Deserialize;
use uuid::Uuid;

use super::{Answer, Refused};
use crate::limits::{LATENCY_FACTOR_MAX, PARALLEL_MAX};
use crate::service::Wishes;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Settings {
    pub(super) sr: Option<Uuid>,
    rate: Option<u64>,
    parallel: Option<usize>,
    latency_factor: Option<f64>,
    receipts: Option<bool>,
}

impl Settings {
    /// Refuses what could not be done as it is said, and what says nothing.
    pub(super) fn check(&self) -> Answer<()> {
        if let Some(parallel) = self.parallel.filter(|parallel| *parallel > PARALLEL_MAX) {
            let message = format!(
                "parallel is {parallel}: at most {PARALLEL_MAX} merges may run at one time; 0 is the default"
            );
            return Err(Refused::bad_request(message));
        }
        let possible = |factor: &f64| (0.0..=LATENCY_FACTOR_MAX).contains(factor);
        if let Some(factor) = self.latency_factor.filter(|factor| !possible(factor)) {
            let message =
                format!("latency_factor is {factor}: it may be from 0 (never) to {LATENCY_FACTOR_MAX}");
            return Err(Refused::bad_request(message));
        }
        let Self { sr: _, rate, parallel, latency_factor, receipts } = self;
        if rate.is_none() && parallel.is_none() && latency_factor.is_none() && receipts.is_none() {
            let message = "nothing is set: give at least one of rate, parallel, latency_factor and receipts";
            return Err(Refused::bad_request(message.into()));
        }
        Ok(())
    }

    pub(super) fn change(&self, wishes: &mut Wishes) {
        wishes.rate = self.rate.unwrap_or(wishes.rate);
        wishes.parallel = self.parallel.unwrap_or(wishes.parallel);
        wishes.latency_factor = self.latency_factor.or(wishes.latency_factor);
        wishes.receipts = self.receipts.unwrap_or(wishes.receipts);
    }
}
