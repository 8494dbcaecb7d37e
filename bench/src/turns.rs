//! Whose turn it is: a plain copy, a guest of ours moved there and back, a guest of QEMU's moved there and back, again. Which of the two guests goes
//! first changes from turn to turn, so that neither always finds what the other left.
//!
//! A run that fails is kept with its reason, and its guest is given up; the next turn begins with a new one. What the
//! harness itself cannot do ends the benchmark.

use std::path::Path;

use anyhow::{Context, Result};
use drover_chaos_cluster::Cluster;

use crate::result::{Run, Side, Summary};
use crate::workload::Workload;
use crate::{copy, interrupt, ours, qemu, table};

/// The two hosts between which everything is moved.
const HOSTS: [usize; 2] = [0, 1];

/// The links' rate while this lives.
struct Shaped<'a> {
    cluster: &'a Cluster,
}

impl<'a> Shaped<'a> {
    fn new(cluster: &'a Cluster, mbit_s: u32) -> Self {
        HOSTS
            .into_iter()
            .for_each(|host| cluster.shape_host(host, mbit_s));
        Self { cluster }
    }
}

impl Drop for Shaped<'_> {
    fn drop(&mut self) {
        HOSTS.into_iter().for_each(|host| self.cluster.unshape_host(host));
    }
}

/// Runs `pairs` pairs of a workload.
pub fn take(cluster: &Cluster, probe: &Path, workload: &Workload, pairs: usize) -> Result<Summary> {
    let _shaped = workload.link_mbit_s.map(|rate| Shaped::new(cluster, rate));
    let mut runs = Vec::new();
    let all: Vec<usize> = (1..=pairs).collect();
    for (number, turn) in all.chunks(workload.moves).enumerate() {
        let last = turn.last() == all.last();
        if workload.upgrade {
            our_turn(cluster, workload, turn, last, &mut runs)?;
            continue;
        }
        for (&pair, (from, to)) in turn.iter().zip(legs()) {
            let copied = copy::measure(cluster, workload, from, to, pair).context("the plain copy")?;
            keep(&mut runs, workload, copied);
        }
        let mut order = [Side::Ours, Side::Qemu];
        order.rotate_left(number % 2);
        for side in order {
            match side {
                Side::Ours => our_turn(cluster, workload, turn, last, &mut runs)?,
                _ => qemus_turn(cluster, probe, workload, turn, &mut runs)?,
            }
        }
    }
    Ok(Summary::new(workload, pairs, runs))
}

/// There and back.
fn legs() -> impl Iterator<Item = (usize, usize)> {
    let [here, there] = HOSTS;
    [(here, there), (there, here)].into_iter().cycle()
}

fn keep(runs: &mut Vec<Run>, workload: &Workload, run: Run) {
    eprintln!("  {}", table::line(workload.name, &run));
    runs.push(run);
}

/// `last`: nothing follows in this workload, so there is time to let the guest read back everything.
fn our_turn(
    cluster: &Cluster,
    workload: &Workload,
    turn: &[usize],
    last: bool,
    runs: &mut Vec<Run>,
) -> Result<()> {
    let name = format!("{}-{}", workload.name.to_lowercase(), turn[0]);
    let mut vm = ours::Vm::boot(cluster, *workload, &name, HOSTS[0]).context("our guest does not come up")?;
    for (number, &pair) in turn.iter().enumerate() {
        let to = match workload.upgrade {
            true => vm.at(),
            false => HOSTS[usize::from(vm.at() == HOSTS[0])],
        };
        let cancel = match workload.upgrade {
            true => None,
            false => Some(
                vm.cancel_move(to)
                    .context("cancelling a migration of our guest")?,
            ),
        };
        let sweep = workload.sweep && last && number + 1 == turn.len();
        let moved = vm.move_to(to, pair);
        // The figures of a run count only if nothing was lost in it.
        let moved = moved.and_then(|run| if sweep { vm.sweep().map(|()| run) } else { Ok(run) });
        interrupt::check()?;
        match moved {
            Ok(run) => {
                keep(runs, workload, Run { cancel, ..run });
            }
            Err(error) => {
                keep(runs, workload, Run::failed(pair, Side::Ours, &error));
                break;
            }
        }
    }
    vm.end().context("ending our guest")
}

fn qemus_turn(
    cluster: &Cluster,
    probe: &Path,
    workload: &Workload,
    turn: &[usize],
    runs: &mut Vec<Run>,
) -> Result<()> {
    let name = format!("{}-{}", workload.name, turn[0]);
    let mut vm = qemu::Vm::boot(cluster, probe, *workload, &name, HOSTS[0])
        .context("QEMU's guest does not come up")?;
    for &pair in turn {
        let to = HOSTS[usize::from(vm.at() == HOSTS[0])];
        let moved = vm.move_to(to, pair);
        interrupt::check()?;
        match moved {
            Ok(run) => keep(runs, workload, run),
            Err(error) => {
                keep(runs, workload, Run::failed(pair, Side::Qemu, &error));
                break;
            }
        }
    }
    Ok(())
}
