//! What the VMM's other threads may do to a migration under way: cancel it, and hear of its progress.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use drover_proto::v1::Progress;

/// Shared between the engine's thread and the VMM's control server.
pub struct Control {
    cancelled: AtomicBool,
    post_copy: AtomicBool,
    on_progress: Box<dyn Fn(Progress) + Send + Sync>,
}

impl Control {
    /// `on_progress` is called from the engine's thread: at every change of phase or round, and some times a second
    /// inside a round. It must not block.
    pub fn new(on_progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self {
            cancelled: AtomicBool::new(false),
            post_copy: AtomicBool::new(false),
            on_progress: Box::new(on_progress),
        }
    }

    /// Asks the engine to give up. It looks between frames and while it waits, so it ends within milliseconds, with
    /// the code `cancelled`. A source that has paused stays paused all the same: only the log's outcome resumes it.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Whether [`Control::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Asks the source to switch to post-copy now, where the intent allows it and the target can; else nothing comes of it.
    pub fn switch_to_post_copy(&self) {
        self.post_copy.store(true, Ordering::Release);
    }

    pub(crate) fn wants_post_copy(&self) -> bool {
        self.post_copy.load(Ordering::Acquire)
    }

    pub(crate) fn report(&self, progress: Progress) {
        (self.on_progress)(progress);
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("cancelled", &self.is_cancelled())
            .finish_non_exhaustive()
    }
}
