//! The collector: deletes what nobody needs and merges what need not be apart.

pub mod candidates;
pub mod forest;
pub mod limits;
pub mod plan;
pub mod reason;
