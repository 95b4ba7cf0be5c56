//! The last verified record: on what each image stood when it could be read
//! (invariant 11).
//!
//! `<sr>/.coppice/verified.db`, shared by smd and gcd, one row per image, by
//! the identity of its file, so that it follows the image through renames.
//! An image that cannot be read any more then holds back merges only below
//! the parents that its row names.
//!
//! ```text
//!   header read               row = what it names            (Heads::note)
//!   header about to change    row = what it named + will     (Heads::expect)
//!   SR detached, or found     no rows: images may have been
//!   in another host's hands   changed where we did not see it
//! ```
//!
//! Losing the file loses nothing but that: merges then wait for the whole SR.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};
use uuid::Uuid;

use crate::error::{Error, Result};

/// How long one process waits for another's transaction.
const BUSY_WAIT: Duration = Duration::from_secs(10);
const FILE: &str = "verified.db";

/// See the module.
#[derive(Debug)]
pub struct Verified {
    connection: Mutex<Connection>,
}

impl Verified {
    /// Opens the record in an SR's dot folder, making it anew if it cannot be
    /// read.
    ///
    /// # Errors
    /// The database cannot be made.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let connection = match open(&path) {
            Ok(connection) => connection,
            Err(_) => {
                remove(&path)?;
                open(&path)?
            }
        };
        Ok(Self { connection: Mutex::new(connection) })
    }

    /// Throws away the record of an SR that nobody has open.
    ///
    /// # Errors
    /// I/O errors.
    pub fn void_at(folder: &Path) -> Result<()> {
        remove(&folder.join(FILE))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // An interrupted transaction was rolled back when it was dropped.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the image stood on, or may stand on by now; none: it was a root.
    /// `None` if nobody knows.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn get(&self, identity: &str) -> Result<Option<Vec<Uuid>>> {
        let sql = "SELECT parents FROM image WHERE identity = ?1";
        let row = |row: &rusqlite::Row<'_>| row.get::<_, String>(0);
        let text = self.lock().query_row(sql, [identity], row).optional()?;
        Ok(text.and_then(|text| text.split_whitespace().map(|word| Uuid::try_parse(word).ok()).collect()))
    }

    /// Sets rows, durably.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn put<'a>(&self, rows: impl IntoIterator<Item = (&'a str, &'a Vec<Uuid>)>) -> Result<()> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        {
            let mut insert = transaction.prepare_cached("INSERT OR REPLACE INTO image VALUES (?1, ?2)")?;
            for (identity, parents) in rows {
                let text: Vec<String> = parents.iter().map(Uuid::to_string).collect();
                insert.execute(params![identity, text.join(" ")])?;
            }
        }
        Ok(transaction.commit()?)
    }

    /// Removes all rows, durably.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn void(&self) -> Result<()> {
        self.lock().execute("DELETE FROM image", [])?;
        Ok(())
    }
}

fn open(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_WAIT)?;
    // A rollback journal works on any filesystem, NFS included. Rows must be
    // durable before a header is written that they speak of.
    connection.pragma_update(None, "journal_mode", "DELETE")?;
    connection.pragma_update(None, "synchronous", "EXTRA")?;
    let table = "CREATE TABLE IF NOT EXISTS image (identity TEXT PRIMARY KEY, parents TEXT NOT NULL) STRICT";
    connection.execute_batch(table)?;
    Ok(connection)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("last verified record", error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_kept_replaced_and_voided_and_garbage_costs_only_them() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let record = Verified::open(folder.path()).unwrap();
        record.put([("one", &vec![a, b]), ("root", &vec![])]).unwrap();
        let again = Verified::open(folder.path()).unwrap();
        assert_eq!(again.get("one").unwrap(), Some(vec![a, b]));
        assert_eq!(again.get("root").unwrap(), Some(vec![]));
        assert_eq!(again.get("two").unwrap(), None);
        again.put([("one", &vec![b])]).unwrap();
        assert_eq!(record.get("one").unwrap(), Some(vec![b]));
        record.void().unwrap();
        assert_eq!(again.get("root").unwrap(), None);
        drop((record, again));
        std::fs::write(folder.path().join(FILE), "x".repeat(9000)).unwrap();
        assert_eq!(Verified::open(folder.path()).unwrap().get("one").unwrap(), None);
    }
}
