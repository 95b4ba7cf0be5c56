//! Alarms: raised by a receipt, kept in the SR's catalog, put down by a person.

use std::collections::BTreeMap;

use sm::Repo;

use super::Collector;
use crate::receipt::Alarm;

/// The alarms that an earlier collector, or one of another host, raised.
pub(super) fn standing(repo: &Repo) -> BTreeMap<String, Alarm> {
    let kept = repo.labels.alarms().unwrap_or_else(|error| {
        tracing::error!(sr = %repo.uuid, %error, "alarms cannot be read: there may be some");
        Vec::new()
    });
    let read = |(name, text): (String, String)| match serde_json::from_str::<Alarm>(&text) {
        Ok(alarm) => {
            tracing::error!(sr = %repo.uuid, job = name, "stands: {}", alarm.text);
            Some((name, alarm))
        }
        Err(error) => {
            tracing::error!(sr = %repo.uuid, job = name, %error, "an alarm cannot be read");
            None
        }
    };
    kept.into_iter().filter_map(read).collect()
}

impl Collector {
    /// The loudest word there is. In memory it stands whatever the catalog says.
    pub(super) fn raise(&self, alarm: &Alarm) {
        for vdi in &alarm.disks {
            tracing::error!(sr = %self.repo.uuid, %vdi, job = alarm.job, "{}", alarm.text);
        }
        let kept = serde_json::to_string(alarm)
            .map_err(|error| error.to_string())
            .and_then(|text| self.repo.labels.raise_alarm(&alarm.job, &text).map_err(|e| e.to_string()));
        if let Err(error) = kept {
            tracing::error!(sr = %self.repo.uuid, job = alarm.job, error, "the alarm ends with this process");
        }
        self.state().alarms.insert(alarm.job.clone(), alarm.clone());
    }

    /// A person has looked: one alarm, or all, are put down and their trees are
    /// collected again. Returns which they were.
    ///
    /// # Errors
    /// The catalog cannot be written; what it still has stands.
    pub fn acknowledge(&self, job: Option<&str>) -> sm::Result<Vec<String>> {
        let standing: Vec<String> = self.state().alarms.keys().cloned().collect();
        let chosen: Vec<String> =
            standing.into_iter().filter(|name| job.is_none_or(|job| job == name)).collect();
        for name in &chosen {
            self.repo.labels.drop_alarm(name)?;
            self.state().alarms.remove(name);
            tracing::warn!(sr = %self.repo.uuid, job = name, "content receipt: alarm acknowledged");
        }
        self.kick();
        Ok(chosen)
    }
}
