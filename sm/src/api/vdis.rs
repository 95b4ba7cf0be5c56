//! Requests about single VDIs: what they are called, where they are served.
//! What is done to their content is in `disks.rs`.

use std::net::SocketAddr;
use std::path::PathBuf;

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use serde_json::json;

use super::App;
use super::answer::{Outcome, document};
use super::figures::{self, Asked};
use super::routes::{read, run, run_on};
use crate::error::{Error, Result};
use crate::ops;
use crate::remote::Remote;
use crate::repo::Repo;
use crate::views::Look;

#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    sr: Option<String>,
    /// Only visible ones of this name.
    name: Option<String>,
    #[serde(default)]
    hidden: bool,
}

pub(super) async fn list_vdis(State(app): State<App>, Query(listing): Query<Listing>) -> Outcome {
    let vdis = run(&app, move |manager| {
        let srs = match &listing.sr {
            Some(sr) => vec![manager.sr_uuid(sr)?],
            None => manager.known().iter().map(|sr| sr.uuid).collect(),
        };
        let mut vdis = Vec::new();
        for sr in srs {
            match manager.open_sr(sr) {
                Ok(open) => vdis.extend(listed(&open.repo, &listing)?),
                Err(Error::SrDetached { .. }) if listing.sr.is_none() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(vdis)
    });
    document(json!({ "vdis": vdis.await? }))
}

fn listed(repo: &Repo, listing: &Listing) -> Result<Vec<crate::views::VdiView>> {
    let Some(name) = &listing.name else {
        return Ok(Look::at(repo)?.vdis(listing.hidden));
    };
    let mut views = Vec::new();
    for vdi in repo.labels.named(name)? {
        match Look::of(repo, vdi)?.one(vdi) {
            Ok(view) if listing.hidden || view.kind != crate::views::Kind::Hidden => views.push(view),
            // A label of what is gone; the next scan drops it.
            Ok(_) | Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(views)
}

#[derive(Debug, Deserialize)]
struct NewVdi {
    sr: String,
    name: String,
    virtual_size: u64,
}

pub(super) async fn create_vdi(State(app): State<App>, body: Bytes) -> Outcome {
    let new: NewVdi = read(&body)?;
    let made = run(&app, move |manager| {
        let open = manager.open_sr(manager.sr_uuid(&new.sr)?)?;
        let vdi = ops::create(&open.repo, &new.name, new.virtual_size)?;
        tracing::info!(sr = %open.repo.uuid, %vdi, operation = "create", "done");
        Look::of(&open.repo, vdi)?.one(vdi)
    });
    document(made.await?)
}

pub(super) async fn show_vdi(State(app): State<App>, Path(vdi): Path<String>) -> Outcome {
    let shown = run(&app, move |manager| {
        let (repo, vdi) = manager.find_vdi(&vdi)?;
        let shown = Look::of(&repo, vdi)?.one(vdi)?;
        let asked = shown.served.is_some().then(|| Asked::of(&repo, &shown));
        Ok((shown, asked))
    });
    let (mut shown, asked) = shown.await?;
    if let Some(asked) = asked {
        shown.trouble = figures::trouble(&app.figures, asked).await;
    }
    document(shown)
}

pub(super) async fn delete_vdi(State(app): State<App>, Path(vdi): Path<String>) -> Outcome {
    let gone = run_on(&app, "delete", vdi, |manager, repo, vdi| {
        let before = Look::of(repo, vdi)?.one(vdi)?;
        ops::delete(repo, vdi)?;
        manager.kick(repo.uuid);
        Ok(before)
    });
    document(gone.await?)
}

pub(super) async fn stat(State(app): State<App>, Path(vdi): Path<String>) -> Outcome {
    let stat = run(&app, move |manager| {
        let (repo, vdi) = manager.find_vdi(&vdi)?;
        ops::stat(&repo, vdi)
    });
    document(stat.await?)
}

#[derive(Debug, Deserialize)]
struct Words {
    name: Option<String>,
    description: Option<String>,
}

pub(super) async fn rename(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let words: Words = read(&body)?;
    let renamed = run_on(&app, "rename", vdi, move |_, repo, vdi| {
        ops::rename(repo, vdi, words.name.as_deref(), words.description.as_deref())?;
        Look::of(repo, vdi)?.one(vdi)
    });
    document(renamed.await?)
}

#[derive(Debug, Deserialize)]
struct AttachHow {
    #[serde(default)]
    read_only: bool,
    listen: Option<SocketAddr>,
    tls_certificates: Option<PathBuf>,
    #[serde(default)]
    tls_verify_peer: bool,
    tls_psk: Option<PathBuf>,
    #[serde(default)]
    insecure: bool,
}

impl AttachHow {
    fn how(self) -> Result<ops::How> {
        let Self { read_only, listen, tls_certificates, tls_verify_peer, tls_psk, insecure } = self;
        let Some(listen) = listen else {
            if tls_certificates.is_some() || tls_psk.is_some() || tls_verify_peer || insecure {
                return Err(Error::BadRequest { reason: "`tls_…` and `insecure` need `listen`".into() });
            }
            return Ok(ops::How { read_only, ..ops::How::default() });
        };
        let remote = Remote { listen, tls_certificates, tls_verify_peer, tls_psk, insecure };
        remote.refuse_open_by_mistake()?;
        Ok(ops::How { read_only, remote: Some(remote), offer: None })
    }
}

pub(super) async fn attach(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let how = read::<AttachHow>(&body)?.how()?;
    let attached = run_on(&app, "attach", vdi, move |manager, repo, vdi| {
        let claim = if how.remote.is_none() { manager.claim_offer()? } else { None };
        let offer = claim.as_ref().map(|claim| claim.remote().clone());
        ops::attach_as(repo, vdi, &ops::How { offer, ..how.clone() })?;
        Look::of(repo, vdi)?.one(vdi)
    });
    document(attached.await?)
}

#[derive(Debug, Deserialize)]
struct DetachHow {
    #[serde(default)]
    force: bool,
}

pub(super) async fn detach(State(app): State<App>, Path(vdi): Path<String>, body: Bytes) -> Outcome {
    let how: DetachHow = read(&body)?;
    let detached = run_on(&app, "detach", vdi, move |manager, repo, vdi| {
        if ops::detach(repo, vdi, how.force)? {
            manager.kick(repo.uuid);
        }
        let look = Look::of(repo, vdi)?;
        look.one(vdi).or_else(|_| Ok(look.missing(vdi)))
    });
    document(detached.await?)
}
