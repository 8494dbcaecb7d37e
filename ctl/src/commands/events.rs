//! `ctl events`: what happened, and with `--follow` what happens.

use std::time::{Duration, Instant};

use super::{Session, not_too_soon};
use crate::args::EventsArgs;
use crate::failure::Result;
use crate::output::print;
use crate::view::EventView;

/// One long poll.
const WAIT: Duration = Duration::from_secs(20);

/// `ctl events`
pub async fn run(session: &Session, args: &EventsArgs) -> Result<()> {
    tokio::select! {
        ended = tell(session, args) => ended,
        // Ctrl-C is how a person ends what never ends by itself.
        _ = tokio::signal::ctrl_c(), if args.follow => Ok(()),
    }
}

async fn tell(session: &Session, args: &EventsArgs) -> Result<()> {
    let mut after = args.after;
    let mut past = Vec::new();
    loop {
        let wait = if args.follow { WAIT } else { Duration::ZERO };
        let asked = Instant::now();
        let answer = session.client.events(after, wait).await?;
        let caught_up = answer.events.is_empty();
        for event in answer.events {
            after = after.max(event.seq);
            let event = EventView::from(event);
            // Without --follow the JSON form is one array, as of every other list.
            if session.out.json() && !args.follow {
                past.push(event);
            } else {
                session.out.stream(&event, &event.line())?;
            }
        }
        if !args.follow && (caught_up || after >= answer.last_seq) {
            break;
        }
        if caught_up {
            not_too_soon(asked).await;
        }
    }
    if session.out.json() {
        let text = serde_json::to_string_pretty(&past).unwrap_or_else(|_| "[]".to_owned());
        print(&text)?;
    }
    Ok(())
}
