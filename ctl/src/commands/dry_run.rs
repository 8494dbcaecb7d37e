//! `ctl migrate … --dry-run`: shows what a migration would be like, and ends as the migration itself would.

use drover_proto::{Code, v1};

use super::Session;
use crate::args::MigrateArgs;
use crate::failure::{Exit, Failure, Result, exit_for};
use crate::view::{DryRunView, ReasonView};

/// See the module.
pub async fn run(session: &Session, args: &MigrateArgs, options: v1::MigrationOptions) -> Result<()> {
    let to = args.host.as_deref().unwrap_or_default();
    let told = session.client.forecast_migration(&args.vm, to, options).await?;
    let view = DryRunView::from(told);
    if session.out.json() || !session.out.quiet {
        session.out.show(&view)?;
    }
    verdict(&view)
}

/// A refusal has the exit code that the migration's would have, one that would be given up that of an aborted one, and one of
/// which nothing is known that of what is in the way of knowing.
pub fn verdict(view: &DryRunView) -> Result<()> {
    if let Some(refusal) = &view.refusal {
        let mut failure = failure(refusal, "the migration would be refused");
        failure.field = view.refusal_field.clone().unwrap_or_default();
        return Err(failure);
    }
    if let Some(unknown) = &view.unknown {
        return Err(failure(
            unknown,
            "nothing speaks against it, but how it would go is unknown",
        ));
    }
    match view
        .forecast
        .as_ref()
        .and_then(|forecast| forecast.reason.as_ref())
    {
        Some(reason) => Err(Failure::new(
            Exit::Aborted,
            &reason.code,
            format!("the migration would be given up: {}", reason.message),
        )),
        None => Ok(()),
    }
}

fn failure(reason: &ReasonView, what: &str) -> Failure {
    let exit = Code::parse(&reason.code).map_or(Exit::Failed, exit_for);
    Failure::new(exit, &reason.code, format!("{what}: {}", reason.message))
}
