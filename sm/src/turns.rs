//! Whose turn it is: operations on one VDI queue, first come, first served;
//! operations on different VDIs do not meet.
//!
//! ```text
//!   a: [snapshot 1] [delete 4]          1 works; 4 waits for it
//!   b: [group 2] [resize 3]             2 waits for a and b at once:
//!   a, b: 2 stands in both queues       it works when first in both
//! ```
//!
//! A ticket enters all its queues in one step, so tickets are ordered the same
//! way in each of them and nobody waits in a circle. Only the operations of
//! this process queue here; against others (the collector, another smd that
//! just died) there are the SR lock and the journal.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::limits::TURNS_WAITING_MAX;

/// All queues of this process.
#[derive(Debug, Clone, Default)]
pub struct Turns {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    tickets: BTreeMap<u64, Ticket>,
    queues: HashMap<Uuid, VecDeque<u64>>,
}

#[derive(Debug)]
struct Ticket {
    operation: &'static str,
    on: Vec<Uuid>,
    /// Taken when its turn comes.
    wake: Option<oneshot::Sender<()>>,
}

/// The right to work on some VDIs; ends when dropped.
#[derive(Debug)]
pub struct Turn {
    turns: Turns,
    ticket: u64,
}

impl Turns {
    /// Waits for the turn of an operation on some VDIs. A caller that goes
    /// away meanwhile leaves the queues.
    ///
    /// # Errors
    /// [`Error::Busy`] when a queue is full, or `limit` ends first.
    pub async fn take(&self, operation: &'static str, on: &[Uuid], limit: Option<Duration>) -> Result<Turn> {
        let (turn, woken) = self.enter(operation, on)?;
        let Some(limit) = limit else {
            // A sender is only dropped with its ticket, that is with `turn`.
            let _ = woken.await;
            return Ok(turn);
        };
        match tokio::time::timeout(limit, woken).await {
            Ok(_) => Ok(turn),
            Err(_) => Err(self.busy(&turn)),
        }
    }

    fn enter(&self, operation: &'static str, on: &[Uuid]) -> Result<(Turn, oneshot::Receiver<()>)> {
        let mut on = on.to_vec();
        on.sort_unstable();
        on.dedup();
        let mut table = self.table();
        let full = |vdi: &&Uuid| table.queues.get(*vdi).is_some_and(|queue| queue.len() >= TURNS_WAITING_MAX);
        if let Some(vdi) = on.iter().find(full) {
            let reason = format!("{TURNS_WAITING_MAX} operations wait for VDI {vdi}");
            return Err(Error::Busy { reason });
        }
        let ticket = table.next;
        table.next += 1;
        for vdi in &on {
            table.queues.entry(*vdi).or_default().push_back(ticket);
        }
        let (wake, woken) = oneshot::channel();
        table.tickets.insert(ticket, Ticket { operation, on, wake: Some(wake) });
        table.wake(ticket);
        drop(table);
        Ok((Turn { turns: self.clone(), ticket }, woken))
    }

    fn busy(&self, turn: &Turn) -> Error {
        let table = self.table();
        let ahead = table.tickets.get(&turn.ticket).and_then(|ticket| {
            let first = |vdi: &Uuid| table.queues.get(vdi)?.front().copied().map(|first| (*vdi, first));
            ticket.on.iter().filter_map(first).find(|(_, first)| *first != turn.ticket)
        });
        let reason = match ahead.and_then(|(vdi, first)| Some((vdi, table.tickets.get(&first)?))) {
            Some((vdi, first)) => {
                format!("{} of VDI {vdi} takes long; this operation is next", first.operation)
            }
            None => "its turn did not come".to_owned(),
        };
        Error::Busy { reason }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change below is whole before anything can panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Wakes a ticket that is first in all its queues.
    fn wake(&mut self, ticket: u64) {
        let Some(found) = self.tickets.get_mut(&ticket) else {
            return;
        };
        let first = |vdi: &Uuid| self.queues.get(vdi).and_then(VecDeque::front) == Some(&ticket);
        if found.on.iter().all(first)
            && let Some(wake) = found.wake.take()
        {
            // Nobody listens any more: its turn is dropped in a moment.
            let _ = wake.send(());
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut table = self.turns.table();
        let Some(ended) = table.tickets.remove(&self.ticket) else {
            return;
        };
        for vdi in ended.on {
            let Some(queue) = table.queues.get_mut(&vdi) else {
                continue;
            };
            queue.retain(|ticket| *ticket != self.ticket);
            match queue.front().copied() {
                Some(next) => table.wake(next),
                None => drop(table.queues.remove(&vdi)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vdi(n: u128) -> Uuid {
        Uuid::from_u128(n)
    }

    fn free(woken: &mut oneshot::Receiver<()>) -> bool {
        woken.try_recv().is_ok()
    }

    #[test]
    fn one_vdi_queues_and_another_does_not_wait() {
        let turns = Turns::default();
        let (first, mut a) = turns.enter("first", &[vdi(1)]).unwrap();
        let (second, mut b) = turns.enter("second", &[vdi(1)]).unwrap();
        let (_third, mut c) = turns.enter("third", &[vdi(1)]).unwrap();
        let (_other, mut d) = turns.enter("other", &[vdi(2)]).unwrap();
        assert!(free(&mut a) && !free(&mut b) && free(&mut d));
        // One that gives up lets the next one past.
        drop(second);
        assert!(!free(&mut c));
        drop(first);
        assert!(free(&mut c));
    }

    #[test]
    fn a_group_waits_for_all_its_members_and_keeps_its_place() {
        let turns = Turns::default();
        let (a, _a) = turns.enter("a", &[vdi(1)]).unwrap();
        let (b, _b) = turns.enter("b", &[vdi(2)]).unwrap();
        let (group, mut woken) = turns.enter("group", &[vdi(2), vdi(1), vdi(2)]).unwrap();
        let (_late, mut late) = turns.enter("late", &[vdi(1)]).unwrap();
        drop(a);
        assert!(!free(&mut woken) && !free(&mut late));
        drop(b);
        assert!(free(&mut woken) && !free(&mut late));
        drop(group);
        assert!(free(&mut late));
    }

    #[test]
    fn a_full_queue_refuses() {
        let turns = Turns::default();
        let held: Vec<_> = (0..TURNS_WAITING_MAX).map(|_| turns.enter("x", &[vdi(1)]).unwrap()).collect();
        assert_eq!(turns.enter("x", &[vdi(1)]).unwrap_err().code(), "BUSY");
        drop(held);
        assert!(turns.enter("x", &[vdi(1)]).is_ok());
        assert!(turns.table().queues.is_empty());
    }

    #[tokio::test]
    async fn a_wait_has_a_limit_and_says_who_is_ahead() {
        let turns = Turns::default();
        let held = turns.take("export", &[vdi(1)], None).await.unwrap();
        let refused = turns.take("delete", &[vdi(1)], Some(Duration::from_millis(5))).await.unwrap_err();
        assert!(refused.to_string().contains("export of VDI"), "{refused}");
        drop(held);
        turns.take("delete", &[vdi(1)], Some(Duration::from_secs(5))).await.unwrap();
    }
}
