//! The controller's process: opens the store, serves, and stops cleanly.
