//! The catalog on the SR: `<sr>/.coppice/catalog.db`.
//!
//! The schema is the sum of numbered steps; `user_version` says how many were
//! taken. A step is never changed once released, only followed by another.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, params};
use uuid::Uuid;

use super::{Event, Label, Labels};
use crate::error::{Error, Result};
use crate::limits::{HISTORY_ROWS_MAX, PAPER_BYTES_MAX};

const STEPS: &[&str] = &[
    // 1
    "CREATE TABLE sr (one INTEGER PRIMARY KEY CHECK (one = 1), uuid TEXT NOT NULL,
        name TEXT NOT NULL) STRICT;
     CREATE TABLE vdi (uuid TEXT PRIMARY KEY, name TEXT NOT NULL, description TEXT NOT NULL,
        snapshot_of TEXT, created_s INTEGER NOT NULL, read_only INTEGER NOT NULL) STRICT;
     CREATE TABLE history (id INTEGER PRIMARY KEY AUTOINCREMENT, at_s INTEGER NOT NULL,
        operation TEXT NOT NULL, vdi TEXT NOT NULL, detail TEXT NOT NULL) STRICT;",
    // 2
    "CREATE TABLE content (vdi TEXT PRIMARY KEY, id TEXT NOT NULL) STRICT;",
    // 3
    "CREATE TABLE paper (id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL,
        number INTEGER NOT NULL, text TEXT NOT NULL) STRICT;
     CREATE INDEX paper_job ON paper (job, number);
     CREATE TABLE alarm (name TEXT PRIMARY KEY, text TEXT NOT NULL) STRICT;",
];
/// How long one process waits for another's transaction.
const BUSY_WAIT: Duration = Duration::from_secs(10);

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        Self::Catalog(error.to_string())
    }
}

/// Labels in the SR's own database.
#[derive(Debug)]
pub struct SqliteLabels {
    connection: Mutex<Connection>,
}

impl SqliteLabels {
    /// Opens the catalog in an SR's dot folder, making it or bringing its
    /// schema up to date. A file that is no database is moved aside: labels
    /// are lost then, and the next scan makes new ones.
    ///
    /// # Errors
    /// The database cannot be opened, or a newer version wrote it.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("catalog.db");
        let opened = open(&path);
        let connection = match opened {
            Err(rusqlite::Error::SqliteFailure(error, _))
                if matches!(
                    error.code,
                    rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt
                ) =>
            {
                let aside = folder.join("catalog.db.broken");
                tracing::error!(path = %path.display(), "the catalog is broken: labels are lost");
                std::fs::rename(&path, aside).map_err(|e| Error::io("move the catalog", e))?;
                open(&path)?
            }
            opened => opened?,
        };
        let labels = Self { connection: Mutex::new(connection) };
        labels.upgrade()?;
        Ok(labels)
    }

    /// Uuid and name of the SR as a catalog has them, if it can be read
    /// without changing anything.
    #[must_use]
    pub fn peek(folder: &Path) -> Option<(Uuid, String)> {
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY | rusqlite::OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(folder.join("catalog.db"), flags).ok()?;
        let row = |row: &Row<'_>| Ok((uuid(row, 0)?, row.get(1)?));
        connection.query_row("SELECT uuid, name FROM sr", [], row).optional().ok()?
    }

    fn upgrade(&self) -> Result<()> {
        let mut connection = self.lock();
        let taken: usize = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if taken > STEPS.len() {
            return Err(Error::Catalog(format!("a newer version wrote it (schema {taken})")));
        }
        for (at, step) in STEPS.iter().enumerate().skip(taken) {
            let transaction = connection.transaction()?;
            transaction.execute_batch(step)?;
            transaction.pragma_update(None, "user_version", at + 1)?;
            transaction.commit()?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // An interrupted transaction was rolled back when it was dropped.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uuid and name of the SR, if they were ever noted.
    ///
    /// # Errors
    /// The catalog cannot be read.
    pub fn sr(&self) -> Result<Option<(Uuid, String)>> {
        let row = |row: &Row<'_>| Ok((uuid(row, 0)?, row.get(1)?));
        Ok(self.lock().query_row("SELECT uuid, name FROM sr", [], row).optional()?)
    }

    /// Notes uuid and name of the SR.
    ///
    /// # Errors
    /// The catalog cannot be written.
    pub fn set_sr(&self, sr: Uuid, name: &str) -> Result<()> {
        let sql = "INSERT INTO sr VALUES (1, ?1, ?2)
            ON CONFLICT (one) DO UPDATE SET uuid = ?1, name = ?2";
        self.lock().execute(sql, params![sr.to_string(), name])?;
        Ok(())
    }

    /// The newest lines of history, newest first.
    ///
    /// # Errors
    /// The catalog cannot be read.
    pub fn history(&self, rows_max: u32) -> Result<Vec<(u64, String, Uuid, String)>> {
        let connection = self.lock();
        let sql = "SELECT at_s, operation, vdi, detail FROM history ORDER BY id DESC LIMIT ?1";
        let mut query = connection.prepare(sql)?;
        let rows =
            query.query_map([rows_max], |row| Ok((row.get(0)?, row.get(1)?, uuid(row, 2)?, row.get(3)?)))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }
}

fn open(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_WAIT)?;
    // A rollback journal works on any filesystem, NFS included.
    connection.pragma_update(None, "journal_mode", "DELETE")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    Ok(connection)
}

fn uuid(row: &Row<'_>, at: usize) -> rusqlite::Result<Uuid> {
    let text: String = row.get(at)?;
    parse(&text, at)
}

fn parse(text: &str, at: usize) -> rusqlite::Result<Uuid> {
    Uuid::try_parse(text)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(at, rusqlite::types::Type::Text, Box::new(e)))
}

/// Columns 1.. of a `vdi` row.
fn label(row: &Row<'_>) -> rusqlite::Result<Label> {
    let snapshot_of: Option<String> = row.get(3)?;
    Ok(Label {
        name: row.get(1)?,
        description: row.get(2)?,
        snapshot_of: snapshot_of.map(|text| parse(&text, 3)).transpose()?,
        created_s: row.get(4)?,
        read_only: row.get(5)?,
    })
}

const COLUMNS: &str = "uuid, name, description, snapshot_of, created_s, read_only";

impl Labels for SqliteLabels {
    fn all(&self) -> Result<BTreeMap<Uuid, Label>> {
        let connection = self.lock();
        let mut query = connection.prepare(&format!("SELECT {COLUMNS} FROM vdi"))?;
        let rows = query.query_map([], |row| Ok((uuid(row, 0)?, label(row)?)))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    fn get(&self, vdi: Uuid) -> Result<Option<Label>> {
        let sql = format!("SELECT {COLUMNS} FROM vdi WHERE uuid = ?1");
        Ok(self.lock().query_row(&sql, [vdi.to_string()], label).optional()?)
    }

    fn named(&self, name: &str) -> Result<Vec<Uuid>> {
        let connection = self.lock();
        let mut query = connection.prepare_cached("SELECT uuid FROM vdi WHERE name = ?1 ORDER BY uuid")?;
        let rows = query.query_map([name], |row| uuid(row, 0))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    fn put(&self, vdi: Uuid, label: &Label) -> Result<()> {
        let sql = format!("INSERT OR REPLACE INTO vdi ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6)");
        let snapshot_of = label.snapshot_of.map(|uuid| uuid.to_string());
        self.lock().execute(
            &sql,
            params![
                vdi.to_string(),
                label.name,
                label.description,
                snapshot_of,
                label.created_s,
                label.read_only
            ],
        )?;
        Ok(())
    }

    fn remove(&self, vdi: Uuid) -> Result<()> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        transaction.execute("DELETE FROM vdi WHERE uuid = ?1", [vdi.to_string()])?;
        transaction.execute("DELETE FROM content WHERE vdi = ?1", [vdi.to_string()])?;
        Ok(transaction.commit()?)
    }

    fn content_id(&self, vdi: Uuid) -> Result<Option<Uuid>> {
        let sql = "SELECT id FROM content WHERE vdi = ?1";
        Ok(self.lock().query_row(sql, [vdi.to_string()], |row| uuid(row, 0)).optional()?)
    }

    fn set_content_id(&self, vdi: Uuid, id: Option<Uuid>) -> Result<()> {
        let vdi = vdi.to_string();
        match id {
            Some(id) => {
                let sql = "INSERT OR REPLACE INTO content (vdi, id) VALUES (?1, ?2)";
                self.lock().execute(sql, [vdi, id.to_string()])?
            }
            None => self.lock().execute("DELETE FROM content WHERE vdi = ?1", [vdi])?,
        };
        Ok(())
    }

    fn note(&self, event: &Event) -> Result<()> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        transaction.execute(
            "INSERT INTO history (at_s, operation, vdi, detail) VALUES (?1, ?2, ?3, ?4)",
            params![event.at_s, event.operation, event.vdi.to_string(), event.detail],
        )?;
        transaction.execute(
            "DELETE FROM history WHERE id <= (SELECT MAX(id) FROM history) - ?1",
            [HISTORY_ROWS_MAX],
        )?;
        transaction.commit()?;
        Ok(())
    }

    fn keep_paper(&self, job: &str, number: u32, text: &str) -> Result<()> {
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        transaction.execute(
            "INSERT INTO paper (job, number, text) VALUES (?1, ?2, ?3)",
            params![job, number, text],
        )?;
        // The one just written stays whatever it takes.
        transaction.execute(
            "DELETE FROM paper WHERE id IN (SELECT id FROM
                (SELECT id, SUM(LENGTH(text)) OVER (ORDER BY id DESC) AS sum FROM paper)
                WHERE sum > ?1 AND id < (SELECT MAX(id) FROM paper))",
            [PAPER_BYTES_MAX],
        )?;
        Ok(transaction.commit()?)
    }

    fn papers(&self, job: &str) -> Result<Vec<String>> {
        let connection = self.lock();
        let mut query =
            connection.prepare_cached("SELECT text FROM paper WHERE job = ?1 ORDER BY number, id")?;
        let rows = query.query_map([job], |row| row.get(0))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    fn raise_alarm(&self, name: &str, text: &str) -> Result<()> {
        self.lock().execute("INSERT OR REPLACE INTO alarm (name, text) VALUES (?1, ?2)", [name, text])?;
        Ok(())
    }

    fn alarms(&self) -> Result<Vec<(String, String)>> {
        let connection = self.lock();
        let mut query = connection.prepare_cached("SELECT name, text FROM alarm ORDER BY name")?;
        let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    fn drop_alarm(&self, name: &str) -> Result<()> {
        self.lock().execute("DELETE FROM alarm WHERE name = ?1", [name])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Label {
        Label {
            name: "web".into(),
            description: "a disk".into(),
            snapshot_of: Some(Uuid::from_u128(7)),
            created_s: 1_700_000_000,
            read_only: true,
        }
    }

    #[test]
    fn labels_and_history_survive_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let labels = SqliteLabels::open(folder.path()).unwrap();
        assert_eq!(labels.sr().unwrap(), None);
        labels.set_sr(b, "first").unwrap();
        labels.set_sr(b, "second").unwrap();
        labels.put(a, &Label::default()).unwrap();
        labels.put(a, &full()).unwrap();
        labels.put(b, &full()).unwrap();
        labels.remove(b).unwrap();
        let event = Event { at_s: 5, operation: "create", vdi: a, detail: "x".into() };
        labels.note(&event).unwrap();
        for vdi in [a, b] {
            labels.set_content_id(vdi, Some(a)).unwrap();
            labels.set_content_id(vdi, Some(b)).unwrap();
        }
        labels.remove(b).unwrap();
        drop(labels);

        let labels = SqliteLabels::open(folder.path()).unwrap();
        assert_eq!(labels.sr().unwrap(), Some((b, "second".into())));
        assert_eq!(labels.get(a).unwrap(), Some(full()));
        assert_eq!(labels.all().unwrap(), BTreeMap::from([(a, full())]));
        assert_eq!((labels.content_id(a).unwrap(), labels.content_id(b).unwrap()), (Some(b), None));
        labels.set_content_id(a, None).unwrap();
        assert_eq!(labels.content_id(a).unwrap(), None);
        assert_eq!(labels.history(9).unwrap(), [(5, "create".into(), a, "x".into())]);
    }

    #[test]
    fn a_file_that_is_no_database_costs_labels_only() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("catalog.db"), "x".repeat(5000)).unwrap();
        let labels = SqliteLabels::open(folder.path()).unwrap();
        assert_eq!(labels.all().unwrap(), BTreeMap::new());
        assert!(folder.path().join("catalog.db.broken").exists());
    }

    #[test]
    fn papers_are_bounded_and_alarms_stand_until_they_are_put_down() {
        let folder = tempfile::tempdir().unwrap();
        let labels = SqliteLabels::open(folder.path()).unwrap();
        labels.keep_paper("old", 0, "first").unwrap();
        labels.keep_paper("job", 1, "b").unwrap();
        labels.keep_paper("job", 0, "a").unwrap();
        labels.raise_alarm("x", "one").unwrap();
        labels.raise_alarm("x", "two").unwrap();
        drop(labels);
        let labels = SqliteLabels::open(folder.path()).unwrap();
        assert_eq!(labels.papers("job").unwrap(), ["a", "b"]);
        assert_eq!(labels.alarms().unwrap(), [("x".to_owned(), "two".to_owned())]);
        labels.drop_alarm("x").unwrap();
        labels.drop_alarm("x").unwrap();
        assert_eq!(labels.alarms().unwrap(), []);
        // Alone larger than all may be: it goes with the next one.
        let large = "x".repeat(PAPER_BYTES_MAX as usize + 1);
        labels.keep_paper("large", 0, &large).unwrap();
        assert_eq!(labels.papers("old").unwrap(), Vec::<String>::new());
        assert_eq!(labels.papers("large").unwrap(), [large]);
        labels.keep_paper("last", 0, "z").unwrap();
        assert_eq!(labels.papers("large").unwrap(), Vec::<String>::new());
        assert_eq!(labels.papers("last").unwrap(), ["z"]);
    }

    #[test]
    fn a_newer_schema_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        drop(SqliteLabels::open(folder.path()).unwrap());
        let connection = Connection::open(folder.path().join("catalog.db")).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        drop(connection);
        assert!(SqliteLabels::open(folder.path()).is_err());
    }
}
