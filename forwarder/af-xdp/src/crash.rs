//! Death at a chosen step, for tests: each store that another process can see is a step.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    static STEPS_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    static STEPS_DONE: Cell<u32> = const { Cell::new(0) };
}

struct Death;

/// A step. Ends the process that [`run`] plays if its time has come.
pub(crate) fn point() {
    STEPS_DONE.set(STEPS_DONE.get() + 1);
    match STEPS_LEFT.get() {
        Some(0) => {
            STEPS_LEFT.set(None);
            resume_unwind(Box::new(Death));
        }
        Some(n) => STEPS_LEFT.set(Some(n - 1)),
        None => {}
    }
}

/// Runs `process` and lets it die before its step number `steps` (counted from 0), or never. `None` if it died; with the
/// result comes the number of steps taken.
pub(crate) fn run<R>(steps: Option<u32>, process: impl FnOnce() -> R) -> Option<(R, u32)> {
    STEPS_LEFT.set(steps);
    STEPS_DONE.set(0);
    match catch_unwind(AssertUnwindSafe(process)) {
        Ok(result) => {
            STEPS_LEFT.set(None);
            Some((result, STEPS_DONE.get()))
        }
        Err(cause) if cause.is::<Death>() => None,
        Err(failure) => resume_unwind(failure),
    }
}

/// Steps taken inside are not the process's.
pub(crate) fn suspended<R>(f: impl FnOnce() -> R) -> R {
    let (left, done) = (STEPS_LEFT.take(), STEPS_DONE.get());
    let result = f();
    STEPS_LEFT.set(left);
    STEPS_DONE.set(done);
    result
}
