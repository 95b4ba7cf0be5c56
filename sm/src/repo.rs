//! One attached SR, as operations use it.

use std::sync::Arc;

use uuid::Uuid;
use vhd::storage::Volumes;

use crate::catalog::Labels;
use crate::heads::Heads;
use crate::host::Host;
use crate::ids::Ids;
use crate::limits::Limits;

/// An SR that this host uses. Everything an operation touches is reached
/// through here, so that the crash simulator can run whole operations.
#[derive(Debug, Clone)]
pub struct Repo {
    /// The SR.
    pub uuid: Uuid,
    /// Its label, for messages.
    pub name: String,
    /// Its volumes and its journal.
    pub volumes: Arc<dyn Volumes>,
    /// Locks, leases and tapdisks of this machine.
    pub host: Arc<dyn Host>,
    /// Names and history.
    pub labels: Arc<dyn Labels>,
    /// Images known without reading them.
    pub heads: Arc<Heads>,
    /// Fresh uuids and the time.
    pub ids: Arc<dyn Ids>,
    /// What bounds every operation.
    pub limits: Limits,
}
