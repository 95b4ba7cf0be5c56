//! A disk that stands still: its tapdisk was told to swap its leaf, and the
//! rename fails. It tries again by itself for a while; any operation on the
//! disk makes it try at once, and says why if that fails.

use tapdisk_control::{ClientError, Refusal, Request};
use uuid::Uuid;

use crate::error::{Error, IoContext, Result};
use crate::journal::{self, RecordName, RecordState};
use crate::repo::Repo;

/// Has a decided swap of the VDI's leaf tried again, if one is outstanding.
/// Asks the tapdisk, so not to be called under the SR lock.
///
/// # Errors
/// [`Error::Stuck`] with the reason if it failed again; what keeps the
/// journal or the tapdisk from being read.
pub fn unstick(repo: &Repo, vdi: Uuid) -> Result<()> {
    for stored in journal::load(repo.volumes.as_ref())? {
        let decided = stored.name.state == RecordState::Decided;
        if !decided || !stored.intent.gives_name(vdi) {
            continue;
        }
        let Some(mut tap) = repo.host.tap(vdi).during(|| format!("tapdisk of VDI {vdi}"))? else {
            continue;
        };
        let intent = RecordName::of_snapshot(stored.name.id);
        if let Err(error) = tap.call(Request::Resume { intent, swap: true }) {
            why(vdi, &error).map_or(Ok(()), Err)?;
        }
    }
    Ok(())
}

/// The error for a tapdisk that was told to swap and could not. Any other
/// refusal says that the swap is done, or under way.
pub(super) fn why(vdi: Uuid, error: &ClientError) -> Option<Error> {
    match error {
        ClientError::Refused(Refusal::Failed { detail }) => {
            Some(Error::Stuck { vdi, reason: detail.clone() })
        }
        _ => None,
    }
}
