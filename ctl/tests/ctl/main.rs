//! `ctl` as its users meet it: a process, its output and its exit code.

mod cluster;
mod console;
mod fake;
