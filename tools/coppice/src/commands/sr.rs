//! `coppice sr …`.

use serde_json::{Value, json};

use super::Context;
use crate::cli::SrCommand;
use crate::failure::{Failure, Outcome};
use crate::render;
use crate::resolve;
use crate::view::{self, Forest, Sr};

/// Does what was asked.
pub fn run(context: &Context, command: SrCommand) -> Outcome<()> {
    let smd = &context.smd;
    match command {
        SrCommand::Create {
            name,
            kind,
            path,
            uuid,
        } => {
            let path = absolute(&path)?;
            let body = json!({"name": name, "type": kind.word(), "path": path, "uuid": uuid});
            show(context, &smd.post("/srs", &body)?);
        }
        SrCommand::Introduce {
            name,
            kind,
            path,
            uuid,
        } => {
            let path = absolute(&path)?;
            let body = json!({
                "name": name, "type": kind.word(), "path": path, "uuid": uuid, "introduce": true,
            });
            show(context, &smd.post("/srs", &body)?);
        }
        SrCommand::List => {
            let answer = smd.get("/srs")?;
            let list: Vec<Sr> = view::list_of(&answer, "srs")?;
            context.output.result(&answer, || render::srs(&list));
        }
        SrCommand::Show(arg) => {
            let sr = resolve::sr(smd, &arg.sr)?;
            show(context, &smd.get(&format!("/srs/{sr}"))?);
        }
        SrCommand::Tree(arg) => {
            let answer = tree(context, &arg.sr)?;
            let forest: Forest = view::read(&answer)?;
            context
                .output
                .result(&answer, || render::tree::forest(&forest));
        }
        SrCommand::Scan(arg) => verb(context, &arg.sr, "scan")?,
        SrCommand::Attach(arg) => verb(context, &arg.sr, "attach")?,
        SrCommand::Detach(arg) => verb(context, &arg.sr, "detach")?,
        SrCommand::Forget(arg) => verb(context, &arg.sr, "forget")?,
        SrCommand::Destroy(arg) => verb(context, &arg.sr, "destroy")?,
    }
    Ok(())
}

/// The trees of one storage repository, as the daemon draws them up.
pub fn tree(context: &Context, sr: &str) -> Outcome<Value> {
    let sr = resolve::sr(&context.smd, sr)?;
    context.smd.get(&format!("/srs/{sr}/tree"))
}

fn verb(context: &Context, sr: &str, verb: &str) -> Outcome<()> {
    let sr = resolve::sr(&context.smd, sr)?;
    show(
        context,
        &context.smd.post(&format!("/srs/{sr}/{verb}"), &json!({}))?,
    );
    Ok(())
}

fn show(context: &Context, answer: &Value) {
    context.output.result(answer, || render::object(answer));
}

/// The daemon has another working folder than the one who types.
fn absolute(path: &std::path::Path) -> Outcome<std::path::PathBuf> {
    std::path::absolute(path)
        .map_err(|e| Failure::new("IO_ERROR", format!("{}: {e}", path.display())))
}
