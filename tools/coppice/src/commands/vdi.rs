//! `coppice vdi …`.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Context, looks, snapshot, transfer};
use crate::cli::VdiCommand;
use crate::client::escaped;
use crate::failure::Outcome;
use crate::jobs;
use crate::reach::RemoteArgs;
use crate::render;
use crate::resolve;
use crate::view::{self, Vdi};

/// Does what was asked.
pub fn run(context: &Context, command: VdiCommand) -> Outcome<()> {
    let smd = &context.smd;
    match command {
        VdiCommand::Create { sr, name, size } => {
            let sr = resolve::sr(smd, &sr)?;
            let body = json!({"sr": sr, "name": name, "virtual_size": size.0});
            show(context, &smd.post("/vdis", &body)?);
        }
        VdiCommand::List { sr } => list(context, sr.as_deref())?,
        VdiCommand::Show(arg) => {
            let vdi = resolve::vdi(smd, &arg.vdi)?;
            show(context, &smd.get(&format!("/vdis/{vdi}"))?);
        }
        VdiCommand::Snapshot { vdis, name, before, after, hook_limit } => {
            let wanted = snapshot::Wanted {
                vdis: &vdis,
                name: name.as_deref(),
                before: before.as_deref(),
                after: after.as_deref(),
                limit: Duration::from_secs(hook_limit),
            };
            let answer = snapshot::take(context, &wanted)?;
            let mut answer = view::inner(answer, "vdis");
            // One disk asked for, one snapshot shown; of several a list.
            if let ([_], Some(only)) = (vdis.as_slice(), answer.get_mut(0)) {
                show(context, &only.take());
            } else {
                table(context, &answer)?;
            }
        }
        VdiCommand::Clone { vdi, name } => verb(context, &vdi, "clone", &json!({"name": name}))?,
        VdiCommand::Export { vdi, base, format, file } => {
            let base = base.as_deref();
            transfer::export(context, &transfer::Export { vdi: &vdi, base, format, file: &file })?;
        }
        VdiCommand::Import { sr, name, base, format, file } => {
            let base = base.as_deref();
            transfer::import(context, &transfer::Import { sr: &sr, name: &name, base, format, file: &file })?;
        }
        VdiCommand::Delete(arg) => {
            let vdi = resolve::vdi(smd, &arg.vdi)?;
            show(context, &smd.delete(&format!("/vdis/{vdi}"))?);
        }
        VdiCommand::Rename { vdi, name } => {
            verb(context, &vdi, "rename", &json!({"name": name}))?;
        }
        VdiCommand::Resize { vdi, size } => {
            verb(context, &vdi, "resize", &json!({"virtual_size": size.0}))?;
        }
        VdiCommand::Revert { vdi, to } => {
            let to = resolve::vdi(smd, &to)?;
            verb(context, &vdi, "revert", &json!({"to": to}))?;
        }
        VdiCommand::Copy { vdi, to, name } => {
            let (vdi, sr) = (resolve::vdi(smd, &vdi)?, resolve::sr(smd, &to)?);
            let job = smd.post(&format!("/vdis/{vdi}/copy"), &json!({"sr": sr, "name": name}))?;
            show(context, &jobs::follow(context, &job)?);
        }
        VdiCommand::Changed { vdi, since } => looks::changed(context, &vdi, &since)?,
        VdiCommand::Map { vdi, offset, length } => {
            looks::map(context, &vdi, offset.map_or(0, |offset| offset.0), length.map(|length| length.0))?;
        }
        VdiCommand::Stat(arg) => looks::stat(context, &arg.vdi)?,
        VdiCommand::Attach { vdi, read_only, remote } => {
            verb(context, &vdi, "attach", &attach_body(read_only, &remote)?)?;
        }
        VdiCommand::Detach { vdi, force } => {
            verb(context, &vdi, "detach", &json!({"force": force}))?;
        }
    }
    Ok(())
}

fn list(context: &Context, sr: Option<&str>) -> Outcome<()> {
    let path = match sr {
        Some(sr) => format!("/vdis?sr={}", escaped(&resolve::sr(&context.smd, sr)?)),
        None => "/vdis".to_owned(),
    };
    table(context, &view::inner(context.smd.get(&path)?, "vdis"))
}

fn attach_body(read_only: bool, remote: &RemoteArgs) -> Outcome<Value> {
    let tls = remote.tls.from_root()?;
    Ok(json!({
        "read_only": read_only,
        "listen": remote.listen,
        "tls_certificates": tls.tls_certificates,
        "tls_verify_peer": tls.tls_verify_peer,
        "tls_psk": tls.tls_psk,
        "insecure": tls.insecure,
    }))
}

fn verb(context: &Context, vdi: &str, verb: &str, body: &Value) -> Outcome<()> {
    let vdi = resolve::vdi(&context.smd, vdi)?;
    show(context, &context.smd.post(&format!("/vdis/{vdi}/{verb}"), body)?);
    Ok(())
}

fn table(context: &Context, answer: &Value) -> Outcome<()> {
    let list: Vec<Vdi> = view::read(answer)?;
    context.output.result(answer, || render::vdis(&list));
    Ok(())
}

fn show(context: &Context, answer: &Value) {
    context.output.result(answer, || render::object(answer));
}
