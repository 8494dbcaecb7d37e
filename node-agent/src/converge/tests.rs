//! Every row of the table, and what holds whatever is desired and observed.

use drover_proto::LOCAL_ADDR;
use drover_proto::v1::VmRef;
use proptest::prelude::*;

use super::*;

const HOST: &str = "host1";

fn migration(id: &str, from: &str, to: &str, epoch: u64, phase: MigrationPhase) -> Migration {
    Migration {
        id: id.into(),
        vm: "vm1".into(),
        from: from.into(),
        to: to.into(),
        epoch,
        phase: phase.into(),
        target_addr: "127.0.0.1:9".into(),
        ..Migration::default()
    }
}

fn wanted(role: VmRole, epoch: u64, migration: Option<Migration>) -> VmDesired {
    VmDesired {
        vm: "vm1".into(),
        epoch,
        spec: None,
        role: role.into(),
        migration,
        arrived_by: String::new(),
        volumes: Vec::new(),
        networks: Vec::new(),
        ..VmDesired::default()
    }
}

fn run(epoch: u64, migration: Option<Migration>) -> HostDesired {
    HostDesired {
        revision: 1,
        vms: vec![wanted(VmRole::Run, epoch, migration)],
        stopping: vec![],
        ..HostDesired::default()
    }
}

fn arrived(epoch: u64, by: &str, newest: Option<Migration>) -> HostDesired {
    let mut desired = run(epoch, newest);
    desired.vms[0].arrived_by = by.into();
    desired
}

fn incoming(epoch: u64, id: &str, phase: MigrationPhase) -> HostDesired {
    let migration = migration(id, "host2", HOST, epoch, phase);
    HostDesired {
        revision: 1,
        vms: vec![wanted(VmRole::Incoming, epoch, Some(migration))],
        stopping: vec![],
        ..HostDesired::default()
    }
}

fn seen(key: Key, life: Life) -> Seen {
    Seen {
        had_right: key.migration().is_none(),
        key,
        life,
        commit_refused: false,
        outgoing_taken: None,
        switch_taken: None,
        commit_taken: false,
        end_reported: false,
        attaching: Attaching::default(),
        snapshot_taken: None,
        snapshot_told: None,
        nics: Vec::new(),
    }
}

fn alive(state: VmmState) -> Life {
    Life::Alive(Alive {
        state,
        reason: None,
        outgoing: None,
        devices: None,
        snapshot: None,
    })
}

fn handed_over(id: &str) -> Life {
    Life::Alive(Alive {
        state: VmmState::HandedOver,
        reason: None,
        outgoing: Some(id.into()),
        devices: None,
        snapshot: None,
    })
}

fn gone() -> Life {
    Life::Gone(reason(Code::VmmDied, "killed"))
}

fn observed(vmms: Vec<Seen>) -> Observed {
    let markers = vmms.iter().map(|seen| seen.key.clone()).collect();
    let highest = vmms
        .iter()
        .map(|seen| (seen.key.vm.clone(), seen.key.epoch))
        .collect();
    Observed {
        host: HOST.into(),
        vmms,
        markers,
        highest,
        confirmed: true,
        told: BTreeSet::new(),
    }
}

fn nothing() -> HostDesired {
    HostDesired {
        revision: 1,
        ..HostDesired::default()
    }
}

#[test]
fn a_vm_that_is_to_run_is_started_once() {
    let desired = run(3, None);
    let actions = converge(&desired, &observed(vec![]));
    assert!(
        matches!(&actions[..], [Action::StartVmm { key, .. }] if *key == Key::start("vm1", 3)),
        "{actions:?}"
    );
    let starting = observed(vec![seen(Key::start("vm1", 3), Life::Starting)]);
    assert_eq!(converge(&desired, &starting), []);
    let running = observed(vec![seen(Key::start("vm1", 3), alive(VmmState::Running))]);
    assert_eq!(converge(&desired, &running), []);
}

#[test]
fn an_epoch_with_a_marker_or_below_the_highest_is_reported_failed() {
    let mut before = observed(vec![]);
    before.markers.insert(Key::start("vm1", 3));
    let mut below = observed(vec![]);
    below.highest.insert("vm1".into(), 4);
    for (observed, code) in [(before, Code::VmmDied), (below, Code::VmmStartFailed)] {
        let actions = converge(&run(3, None), &observed);
        let [
            Action::ReportGone {
                epoch: 3,
                state: VmState::Failed,
                reason,
                ..
            },
        ] = &actions[..]
        else {
            panic!("{actions:?}")
        };
        assert_eq!(reason.code, code.as_str());
        let told = Observed {
            told: [("vm1".to_owned(), 3)].into(),
            ..observed
        };
        assert_eq!(converge(&run(3, None), &told), []);
    }
}

#[test]
fn a_run_that_a_migration_brought_is_never_booted() {
    let by = migration("m1", "host2", HOST, 3, MigrationPhase::Committed);
    let actions = converge(&arrived(3, "m1", Some(by)), &observed(vec![]));
    assert!(
        matches!(
            &actions[..],
            [Action::ReportGone {
                state: VmState::Failed,
                ..
            }]
        ),
        "{actions:?}"
    );
}

/// Every state that a migration away from here, begun after the VM came by m1 as epoch 2, can be in.
fn later_migrations() -> impl Iterator<Item = Migration> {
    [
        MigrationPhase::Planned,
        MigrationPhase::Preparing,
        MigrationPhase::PreCopy,
        MigrationPhase::Aborted,
    ]
    .into_iter()
    .map(|phase| migration("m2", HOST, "host3", 3, phase))
}

#[test]
fn a_vm_that_arrived_and_died_with_its_agent_is_reported_also_after_a_later_migration() {
    for later in later_migrations() {
        // The next agent finds its VMM gone, and knows of no right it had.
        let desired = arrived(2, "m1", Some(later));
        let found = seen(Key::incoming("vm1", 2, "m1"), gone());
        let mut here = observed(vec![found.clone()]);
        let actions = converge(&desired, &here);
        let [Action::ReportEnd { key, state, .. }] = &actions[..] else {
            panic!("{actions:?}")
        };
        assert_eq!((key, *state), (&found.key, VmState::Failed));
        here.vmms[0].end_reported = true;
        assert_eq!(converge(&desired, &here), []);
        // Nor does another of that epoch boot when nothing at all is left here.
        here.vmms.clear();
        for markers in [here.markers.clone(), BTreeSet::new()] {
            here.markers = markers;
            let actions = converge(&desired, &here);
            assert!(
                matches!(
                    &actions[..],
                    [Action::ReportGone {
                        state: VmState::Failed,
                        epoch: 2,
                        ..
                    }]
                ),
                "{actions:?}"
            );
        }
    }
}

#[test]
fn a_vm_that_arrived_is_known_before_it_answers_also_after_a_later_migration() {
    for later in later_migrations().map(Some).chain([None]) {
        for life in [Life::Starting, Life::Silent] {
            let silent = seen(Key::incoming("vm1", 2, "m1"), life);
            assert_eq!(
                converge(&arrived(2, "m1", later.clone()), &observed(vec![silent])),
                []
            );
        }
        let found = seen(Key::incoming("vm1", 2, "m1"), alive(VmmState::Ready));
        let actions = converge(&arrived(2, "m1", later), &observed(vec![found.clone()]));
        assert_eq!(actions, [Action::Committed { key: found.key }]);
    }
}

#[test]
fn only_the_vmm_that_brought_the_epoch_is_its_run() {
    let right = seen(Key::incoming("vm1", 2, "m1"), alive(VmmState::Running));
    let right = Seen {
        had_right: true,
        ..right
    };
    for wrong in [Key::start("vm1", 2), Key::incoming("vm1", 2, "m0")] {
        let wrong = seen(wrong, alive(VmmState::Running));
        let both = observed(vec![right.clone(), wrong.clone()]);
        let actions = converge(&arrived(2, "m1", None), &both);
        assert!(
            matches!(&actions[..], [Action::Destroy { key, .. }] if *key == wrong.key),
            "{actions:?}"
        );
    }
    let actions = converge(&run(2, None), &observed(vec![right]));
    assert!(matches!(&actions[..], [Action::Destroy { .. }]), "{actions:?}");
}

#[test]
fn what_is_left_of_an_earlier_run_goes_before_the_next_starts() {
    let old = seen(Key::start("vm1", 3), alive(VmmState::Running));
    let actions = converge(&run(4, None), &observed(vec![old]));
    assert!(
        matches!(&actions[..], [Action::Destroy { key, .. }] if key.epoch == 3),
        "{actions:?}"
    );
}

#[test]
fn an_incoming_vmm_is_started_in_preparing_only_and_once_a_migration() {
    let actions = converge(&incoming(4, "m1", MigrationPhase::Preparing), &observed(vec![]));
    assert!(matches!(&actions[..], [Action::StartVmm { key, .. }] if *key == Key::incoming("vm1", 4, "m1")));
    let late = converge(&incoming(4, "m1", MigrationPhase::PreCopy), &observed(vec![]));
    assert!(matches!(&late[..], [Action::Abort { .. }]), "{late:?}");
    let mut before = observed(vec![]);
    before.markers.insert(Key::incoming("vm1", 4, "m1"));
    before.highest.insert("vm1".into(), 4);
    let again = converge(&incoming(4, "m1", MigrationPhase::Preparing), &before);
    assert!(matches!(&again[..], [Action::Abort { .. }]), "{again:?}");
    let next = converge(&incoming(4, "m2", MigrationPhase::Preparing), &before);
    assert!(matches!(&next[..], [Action::StartVmm { .. }]), "{next:?}");
}

#[test]
fn the_end_of_a_target_aborts_its_migration() {
    for life in [gone(), alive(VmmState::Failed), alive(VmmState::Exited)] {
        let target = seen(Key::incoming("vm1", 4, "m1"), life);
        let actions = converge(
            &incoming(4, "m1", MigrationPhase::PreCopy),
            &observed(vec![target]),
        );
        let [Action::Abort { migration, phase, .. }] = &actions[..] else {
            panic!("{actions:?}")
        };
        assert_eq!((migration.as_str(), *phase), ("m1", MigrationPhase::PreCopy));
    }
}

#[test]
fn the_end_of_a_committed_target_is_the_vms_failure() {
    let by = migration("m1", "host2", HOST, 4, MigrationPhase::Committed);
    let target = seen(Key::incoming("vm1", 4, "m1"), gone());
    let actions = converge(&arrived(4, "m1", Some(by)), &observed(vec![target]));
    assert!(
        matches!(
            &actions[..],
            [Action::ReportEnd {
                state: VmState::Failed,
                ..
            }]
        ),
        "{actions:?}"
    );
}

#[test]
fn a_target_learns_of_its_commit_from_the_desired_state_too() {
    let by = migration("m1", "host2", HOST, 4, MigrationPhase::Committed);
    let target = seen(Key::incoming("vm1", 4, "m1"), alive(VmmState::Ready));
    let actions = converge(&arrived(4, "m1", Some(by)), &observed(vec![target]));
    assert_eq!(
        actions,
        [Action::Committed {
            key: Key::incoming("vm1", 4, "m1")
        }]
    );
}

#[test]
fn a_ready_target_of_an_aborted_migration_never_gets_a_run_of_the_same_epoch() {
    let left = seen(Key::incoming("vm1", 4, "m1"), alive(VmmState::Ready));
    let actions = converge(&run(4, None), &observed(vec![left.clone()]));
    assert!(matches!(&actions[..], [Action::Destroy { .. }]), "{actions:?}");
    let mut over = observed(vec![Seen { life: gone(), ..left }]);
    let actions = converge(&run(4, None), &over);
    assert!(
        matches!(&actions[..], [Action::Forget { .. }, Action::StartVmm { .. }]),
        "{actions:?}"
    );
    over.vmms.clear();
    assert!(
        matches!(&converge(&run(4, None), &over)[..], [Action::StartVmm { key, .. }] if key.kind == Kind::Start)
    );
}

#[test]
fn a_source_connects_in_pre_copy_once() {
    let planned = migration("m1", HOST, "host2", 4, MigrationPhase::PreCopy);
    let source = seen(Key::start("vm1", 3), alive(VmmState::Running));
    let actions = converge(&run(3, Some(planned.clone())), &observed(vec![source.clone()]));
    let [Action::StartOutgoing { request, .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!((request.target_host.as_str(), request.target_epoch), ("host2", 4));
    let taken = Seen {
        outgoing_taken: Some("m1".into()),
        switch_taken: None,
        ..source.clone()
    };
    assert_eq!(
        converge(&run(3, Some(planned.clone())), &observed(vec![taken])),
        []
    );
    let begun = Life::Alive(Alive {
        state: VmmState::Running,
        reason: None,
        outgoing: Some("m1".into()),
        devices: None,
        snapshot: None,
    });
    assert_eq!(
        converge(
            &run(3, Some(planned.clone())),
            &observed(vec![Seen {
                life: begun,
                ..source.clone()
            }])
        ),
        []
    );
    let preparing = Migration {
        phase: MigrationPhase::Preparing.into(),
        ..planned.clone()
    };
    assert_eq!(
        converge(&run(3, Some(preparing)), &observed(vec![source.clone()])),
        []
    );
    let no_address = Migration {
        target_addr: String::new(),
        ..planned
    };
    assert_eq!(converge(&run(3, Some(no_address)), &observed(vec![source])), []);
}

#[test]
fn a_paused_source_waits_until_the_log_decides() {
    let source = seen(Key::start("vm1", 3), handed_over("m1"));
    let under_way = migration("m1", HOST, "host2", 4, MigrationPhase::PreCopy);
    assert_eq!(
        converge(&run(3, Some(under_way.clone())), &observed(vec![source.clone()])),
        []
    );

    let aborted = Migration {
        phase: MigrationPhase::Aborted.into(),
        ..under_way.clone()
    };
    let actions = converge(&run(3, Some(aborted.clone())), &observed(vec![source.clone()]));
    let resume = Action::Outcome {
        key: source.key.clone(),
        migration: "m1".into(),
        committed: false,
    };
    assert_eq!(actions, std::slice::from_ref(&resume));
    // Until it has learned: its answer may be of another life of its agent, or have crossed its pause.
    let resumed = |outgoing: Option<&str>| {
        let life = Life::Alive(Alive {
            state: VmmState::Running,
            reason: None,
            outgoing: outgoing.map(str::to_owned),
            devices: None,
            snapshot: None,
        });
        observed(vec![Seen {
            outgoing_taken: Some("m1".into()),
            switch_taken: None,
            life,
            ..source.clone()
        }])
    };
    let desired = run(3, Some(aborted));
    assert_eq!(
        converge(&desired, &resumed(Some("m1"))),
        std::slice::from_ref(&resume)
    );
    assert_eq!(converge(&desired, &resumed(None)), []);

    // A later migration of the same run: the earlier one must have been aborted.
    let later = migration("m2", HOST, "host3", 4, MigrationPhase::Planned);
    assert_eq!(
        converge(&run(3, Some(later)), &observed(vec![source.clone()])),
        [resume]
    );

    let over = Action::Outcome {
        key: source.key.clone(),
        migration: "m1".into(),
        committed: true,
    };
    assert_eq!(converge(&nothing(), &observed(vec![source])), [over]);
}

#[test]
fn absence_counts_only_when_confirmed_or_when_a_higher_epoch_is_desired() {
    let vmm = || seen(Key::start("vm1", 3), handed_over("m1"));
    let unconfirmed = Observed {
        confirmed: false,
        ..observed(vec![vmm()])
    };
    assert_eq!(converge(&nothing(), &unconfirmed), [Action::Confirm]);
    let actions = converge(&incoming(5, "m2", MigrationPhase::Preparing), &unconfirmed);
    assert!(
        matches!(&actions[..], [Action::Outcome { committed: true, .. }]),
        "{actions:?}"
    );
    let gone = Observed {
        confirmed: false,
        ..observed(vec![Seen {
            life: gone(),
            ..vmm()
        }])
    };
    assert_eq!(converge(&nothing(), &gone), [Action::Confirm]);
}

#[test]
fn an_end_is_reported_before_the_vmm_is_destroyed_and_forgotten_when_no_longer_desired() {
    for (state, reported) in [
        (VmmState::Failed, VmState::Failed),
        (VmmState::Exited, VmState::Stopped),
    ] {
        let vmm = seen(Key::start("vm1", 3), alive(state));
        let actions = converge(&run(3, None), &observed(vec![vmm.clone()]));
        assert!(
            matches!(&actions[..], [Action::ReportEnd { state, .. }] if *state == reported),
            "{actions:?}"
        );
        let told = Seen {
            end_reported: true,
            ..vmm
        };
        assert!(matches!(
            &converge(&run(3, None), &observed(vec![told.clone()]))[..],
            [Action::Destroy { .. }]
        ));
        let gone = Seen { life: gone(), ..told };
        assert_eq!(converge(&run(3, None), &observed(vec![gone.clone()])), []);
        assert_eq!(
            converge(&nothing(), &observed(vec![gone.clone()])),
            [Action::Forget { key: gone.key }]
        );
    }
}

#[test]
fn a_stopped_vm_is_destroyed_then_reported_stopped_then_forgotten() {
    let stopping = HostDesired {
        stopping: vec![VmRef {
            vm: "vm1".into(),
            epoch: 3,
        }],
        ..nothing()
    };
    let vmm = seen(Key::start("vm1", 3), handed_over("m1"));
    assert!(matches!(
        &converge(&stopping, &observed(vec![vmm.clone()]))[..],
        [Action::Destroy { .. }]
    ));
    let gone = Seen { life: gone(), ..vmm };
    let actions = converge(&stopping, &observed(vec![gone.clone()]));
    assert!(
        matches!(
            &actions[..],
            [Action::ReportEnd {
                state: VmState::Stopped,
                ..
            }]
        ),
        "{actions:?}"
    );
    let told = Seen {
        end_reported: true,
        ..gone
    };
    assert!(matches!(
        &converge(&stopping, &observed(vec![told]))[..],
        [Action::Forget { .. }]
    ));
    let never = converge(&stopping, &observed(vec![]));
    assert!(
        matches!(
            &never[..],
            [Action::ReportGone {
                state: VmState::Stopped,
                epoch: 3,
                ..
            }]
        ),
        "{never:?}"
    );
}

#[test]
fn an_aborted_target_is_destroyed_and_forgotten_without_a_report() {
    let target = seen(Key::incoming("vm1", 4, "m1"), alive(VmmState::Ready));
    assert!(matches!(
        &converge(&nothing(), &observed(vec![target.clone()]))[..],
        [Action::Destroy { .. }]
    ));
    let refused = Seen {
        commit_refused: true,
        ..target.clone()
    };
    let still_listed = incoming(4, "m1", MigrationPhase::PreCopy);
    assert!(matches!(
        &converge(&still_listed, &observed(vec![refused]))[..],
        [Action::Destroy { .. }]
    ));
    let gone = Seen {
        life: gone(),
        ..target
    };
    assert_eq!(
        converge(&nothing(), &observed(vec![gone.clone()])),
        [Action::Forget { key: gone.key }]
    );
}

/// An upgrade of the run of epoch 1, as its host is told of it before the commit.
fn upgrading(phase: MigrationPhase) -> HostDesired {
    let mut upgrade = migration("m1", HOST, HOST, 2, phase);
    upgrade.target_addr = LOCAL_ADDR.into();
    HostDesired {
        revision: 1,
        vms: vec![
            wanted(VmRole::Run, 1, Some(upgrade.clone())),
            wanted(VmRole::Incoming, 2, Some(upgrade)),
        ],
        stopping: vec![],
        ..HostDesired::default()
    }
}

#[test]
fn the_target_of_an_upgrade_is_started_beside_its_source_and_beside_nothing_else() {
    let running = || seen(Key::start("vm1", 1), alive(VmmState::Running));
    let target = Key::incoming("vm1", 2, "m1");
    let starts = |vmms| {
        let desired = upgrading(MigrationPhase::Preparing);
        let actions = converge(&desired, &observed(vmms));
        actions
            .iter()
            .any(|action| matches!(action, Action::StartVmm { key, .. } if *key == target))
    };
    assert!(starts(vec![running()]));
    let earlier = Key::incoming("vm1", 2, "m0");
    assert!(
        !starts(vec![running(), seen(earlier, alive(VmmState::Ready))]),
        "the target of an aborted one goes first"
    );
    // The source of a move to this host is on another: what is here of that epoch is a leftover.
    let mut desired = upgrading(MigrationPhase::Preparing);
    desired.vms.remove(0);
    desired.vms[0].migration = Some(migration("m1", "host2", HOST, 2, MigrationPhase::Preparing));
    let actions = converge(&desired, &observed(vec![running()]));
    assert!(
        matches!(&actions[..], [Action::Destroy { key, .. }] if key.epoch == 1),
        "{actions:?}"
    );
}

#[test]
fn both_vmms_of_an_upgrade_are_told_what_the_log_says() {
    let target = Key::incoming("vm1", 2, "m1");
    let both = |source: Life, next: Life| {
        let vmms = vec![seen(Key::start("vm1", 1), source), seen(target.clone(), next)];
        observed(vmms)
    };
    let waiting = both(alive(VmmState::Running), alive(VmmState::Incoming));
    let actions = converge(&upgrading(MigrationPhase::PreCopy), &waiting);
    let [Action::StartOutgoing { key, request }] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(*key, Key::start("vm1", 1));
    assert_eq!(
        (request.target_addr.as_str(), request.target_epoch),
        (LOCAL_ADDR, 2)
    );

    let paused = both(handed_over("m1"), alive(VmmState::Ready));
    assert_eq!(converge(&upgrading(MigrationPhase::PreCopy), &paused), []);

    let committed = arrived(
        2,
        "m1",
        Some(migration("m1", HOST, HOST, 2, MigrationPhase::Committed)),
    );
    let actions = converge(&committed, &paused);
    assert!(
        matches!(
            &actions[..],
            [
                Action::Outcome { key: source, committed: true, .. },
                Action::Committed { key: next },
            ] if source.epoch == 1 && *next == target
        ),
        "{actions:?}"
    );

    let aborted = run(1, Some(migration("m1", HOST, HOST, 2, MigrationPhase::Aborted)));
    let actions = converge(&aborted, &paused);
    assert!(
        matches!(
            &actions[..],
            [
                Action::Outcome { key: source, committed: false, .. },
                Action::Destroy { key: next, .. },
            ] if source.epoch == 1 && *next == target
        ),
        "{actions:?}"
    );
}

#[test]
fn the_end_of_either_vmm_of_an_upgrade_is_its_own() {
    let target = Key::incoming("vm1", 2, "m1");
    let desired = upgrading(MigrationPhase::PreCopy);
    let vmms = |source, next| {
        observed(vec![
            seen(Key::start("vm1", 1), source),
            seen(target.clone(), next),
        ])
    };
    let actions = converge(&desired, &vmms(alive(VmmState::Running), gone()));
    assert!(
        actions
            .iter()
            .any(|action| matches!(action, Action::Abort { migration, .. } if migration == "m1"))
            && !actions
                .iter()
                .any(|action| matches!(action, Action::ReportEnd { .. })),
        "the guest runs on: {actions:?}"
    );
    let actions = converge(&desired, &vmms(gone(), alive(VmmState::Incoming)));
    assert!(
        matches!(&actions[..], [Action::ReportEnd { key, state: VmState::Failed, .. }] if key.epoch == 1),
        "{actions:?}"
    );
}

fn key() -> impl Strategy<Value = Key> {
    (
        "vm[12]",
        1u64..5,
        prop_oneof![Just(None), (1u8..4).prop_map(Some)],
    )
        .prop_map(|(vm, epoch, id)| match id {
            None => Key::start(&vm, epoch),
            Some(id) => Key::incoming(&vm, epoch, &format!("m{id}")),
        })
}

fn life() -> impl Strategy<Value = Life> {
    let alive = (1i32..9, proptest::option::of("m[123]")).prop_map(|(state, outgoing)| {
        let state = VmmState::try_from(state).unwrap();
        Life::Alive(Alive {
            state,
            reason: None,
            outgoing,
            devices: None,
            snapshot: None,
        })
    });
    prop_oneof![4 => alive, 1 => Just(Life::Starting), 1 => Just(Life::Silent), 1 => Just(gone())]
}

fn any_migration() -> impl Strategy<Value = Migration> {
    ("m[123]", 0usize..3, 0usize..3, 1u64..6, 1i32..9).prop_map(|(id, from, to, epoch, phase)| {
        let hosts = [HOST, "host2", "host3"];
        migration(
            &id,
            hosts[from],
            hosts[to],
            epoch,
            MigrationPhase::try_from(phase).unwrap(),
        )
    })
}

prop_compose! {
    fn any_seen()(key in key(), life in life(), flags in any::<[bool; 3]>(), ids in any::<[Option<bool>; 2]>()) -> Seen {
        let [had_right, commit_refused, end_reported] = flags;
        Seen {
            had_right: had_right || key.migration().is_none(),
            key, life, commit_refused, end_reported,
            outgoing_taken: ids[0].map(|_| "m1".into()),
            switch_taken: None,
            commit_taken: ids[1] == Some(true), attaching: Attaching::default(), snapshot_taken: None, snapshot_told: None, nics: Vec::new(), }
    }
}

prop_compose! {
    fn any_observed()(
        vmms in proptest::collection::vec(any_seen(), 0..4),
        markers in proptest::collection::btree_set(key(), 0..4),
        highest in proptest::collection::btree_map("vm[12]", 1u64..5, 0..3),
        confirmed in any::<bool>(),
    ) -> Observed {
        let mut vmms = vmms;
        vmms.sort_by(|a, b| a.key.cmp(&b.key));
        vmms.dedup_by(|a, b| a.key == b.key);
        let markers = markers.into_iter().chain(vmms.iter().map(|seen| seen.key.clone())).collect();
        Observed { host: HOST.into(), vmms, markers, highest, confirmed, told: BTreeSet::new() }
    }
}

prop_compose! {
    fn any_desired()(
        vms in proptest::collection::vec(
            ("vm[12]", 1u64..6, any::<bool>(), proptest::option::of(any_migration()), "|m[123]"), 0..4),
        stopping in proptest::collection::vec(("vm[12]", 1u64..5), 0..2),
    ) -> HostDesired {
        let vms = vms.into_iter().map(|(vm, epoch, run, migration, by)| VmDesired {
            vm, epoch, spec: None, role: if run { VmRole::Run } else { VmRole::Incoming }.into(), migration,
            arrived_by: if run { by } else { String::new() }, volumes: Vec::new(), networks: Vec::new(), ..VmDesired::default() }).collect();
        let stopping = stopping.into_iter().map(|(vm, epoch)| VmRef { vm, epoch }).collect();
        HostDesired { revision: 1, vms, stopping, ..HostDesired::default() }
    }
}

fn vmm<'a>(observed: &'a mut Observed, key: &Key) -> &'a mut Seen {
    observed
        .vmms
        .iter_mut()
        .find(|seen| seen.key == *key)
        .expect("only what is here is acted on")
}

fn is_desired(desired: &HostDesired, seen: &Seen) -> bool {
    desired.vms.iter().any(|wanted| matches(&seen.key, wanted))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn no_epoch_is_started_twice_or_below_the_highest_or_beside_another(desired in any_desired(), observed in any_observed()) {
        for action in converge(&desired, &observed) {
            let Action::StartVmm { key, desired: wanted } = action else { continue };
            prop_assert!(!observed.markers.contains(&key), "{key} has a marker");
            prop_assert!(observed.highest.get(&key.vm).is_none_or(|&highest| key.epoch >= highest));
            prop_assert!(desired.vms.contains(&wanted) && (key.vm.as_str(), key.epoch) == (&wanted.vm, wanted.epoch));
            let upgrade = wanted.role() == VmRole::Incoming && wanted.migration.as_ref().is_some_and(|m| m.from == m.to);
            let beside = observed.vmms.iter().any(|seen| {
                let is_source = upgrade && seen.had_right && seen.key.epoch + 1 == key.epoch;
                seen.key.vm == key.vm && !matches!(seen.life, Life::Gone(_)) && !is_source
            });
            prop_assert!(!beside, "{key} beside a VMM that lives");
            prop_assert!(wanted.arrived_by.is_empty(), "{key} is booted, and arrived by {}", wanted.arrived_by);
            prop_assert_eq!(wanted.role() == VmRole::Run, key.kind == Kind::Start);
        }
    }

    #[test]
    fn what_is_desired_ends_only_after_its_end_was_reported_or_its_commit_refused(
        desired in any_desired(), observed in any_observed(),
    ) {
        for action in converge(&desired, &observed) {
            let (Action::Destroy { key, .. } | Action::Outcome { key, committed: true, .. }) = &action else { continue };
            let seen = observed.vmms.iter().find(|seen| seen.key == *key).expect("only what is here is destroyed");
            if is_desired(&desired, seen) {
                prop_assert!(seen.end_reported || seen.commit_refused, "{action:?}");
            } else {
                let higher = desired.vms.iter().any(|wanted| wanted.vm == key.vm && wanted.epoch > key.epoch);
                prop_assert!(observed.confirmed || higher, "{action:?} without a confirmation");
            }
        }
    }

    #[test]
    fn what_is_not_desired_is_gone_in_the_end(desired in any_desired(), observed in any_observed()) {
        let mut observed = Observed { confirmed: true, ..observed };
        for _ in 0..16 {
            let actions = converge(&desired, &observed);
            for action in actions {
                match action {
                    Action::Destroy { key, .. } | Action::Outcome { key, committed: true, .. } => {
                        vmm(&mut observed, &key).life = gone();
                    }
                    Action::ReportEnd { key, .. } => vmm(&mut observed, &key).end_reported = true,
                    Action::Forget { key } => observed.vmms.retain(|seen| seen.key != key),
                    _ => {}
                }
            }
        }
        for seen in &observed.vmms {
            prop_assert!(is_desired(&desired, seen), "{seen:?} stayed");
        }
    }

    #[test]
    fn a_source_resumes_only_by_an_abort_that_the_desired_state_shows(desired in any_desired(), observed in any_observed()) {
        for action in converge(&desired, &observed) {
            let Action::Outcome { key, migration: id, committed: false } = action else { continue };
            let shown = desired.vms.iter().filter(|wanted| (&wanted.vm, wanted.epoch) == (&key.vm, key.epoch));
            let proves = |m: &Migration| {
                (m.id == id && m.phase() == MigrationPhase::Aborted)
                    || migration_number(&m.id) > migration_number(&id)
            };
            prop_assert!(shown.filter_map(|wanted| wanted.migration.as_ref()).any(proves));
        }
    }

    #[test]
    fn one_thing_is_asked_of_a_vmm_at_a_time(desired in any_desired(), observed in any_observed()) {
        let actions = converge(&desired, &observed);
        for seen in &observed.vmms {
            let asked = actions.iter().filter(|action| match action {
                Action::StartOutgoing { key, .. } | Action::Outcome { key, .. } | Action::Committed { key }
                | Action::Destroy { key, .. } | Action::ReportEnd { key, .. } | Action::Forget { key } => *key == seen.key,
                _ => false,
            });
            prop_assert!(asked.count() <= 1);
        }
        prop_assert_eq!(&actions, &converge(&desired, &observed));
    }
}

#[test]
fn a_source_is_told_once_to_switch_to_post_copy_and_only_after_it_has_begun() {
    let wanted = Migration {
        post_copy_wanted: true,
        ..migration("m1", HOST, "host2", 4, MigrationPhase::PreCopy)
    };
    let desired = run(3, Some(wanted));
    let source = seen(Key::start("vm1", 3), alive(VmmState::Running));
    let actions = converge(&desired, &observed(vec![source.clone()]));
    assert!(
        matches!(&actions[..], [Action::StartOutgoing { .. }]),
        "{actions:?}"
    );
    let begun = Seen {
        outgoing_taken: Some("m1".into()),
        ..source
    };
    let switch = Action::SwitchToPostCopy {
        key: begun.key.clone(),
        migration: "m1".into(),
    };
    assert_eq!(converge(&desired, &observed(vec![begun.clone()])), [switch]);
    let told = Seen {
        switch_taken: Some("m1".into()),
        ..begun
    };
    assert_eq!(converge(&desired, &observed(vec![told])), []);
}

#[test]
fn a_source_that_serves_is_told_the_commit_and_left_alone_until_it_is_not_needed() {
    let newest = migration("m3", HOST, "host2", 3, MigrationPhase::PostCopy);
    let desired = HostDesired {
        revision: 1,
        vms: vec![wanted(VmRole::Serving, 2, Some(newest))],
        stopping: vec![],
        ..HostDesired::default()
    };
    let key = || Key::start("vm1", 2);
    let here = |life: Life| Observed {
        host: HOST.into(),
        vmms: vec![seen(key(), life)],
        confirmed: true,
        ..Observed::default()
    };
    let serving = |state| {
        Life::Alive(Alive {
            state,
            reason: None,
            outgoing: Some("m3".into()),
            devices: None,
            snapshot: None,
        })
    };
    let serve = Action::Serve {
        key: key(),
        migration: "m3".into(),
    };
    assert_eq!(converge(&desired, &here(handed_over("m3"))), [serve]);
    assert_eq!(converge(&desired, &here(serving(VmmState::Serving))), []);
    // Nobody else of that epoch is kept, and none is started.
    for life in [
        alive(VmmState::Running),
        alive(VmmState::Incoming),
        handed_over("m2"),
    ] {
        let actions = converge(&desired, &here(life.clone()));
        assert!(
            matches!(&actions[..], [Action::Destroy { .. }]),
            "{life:?}: {actions:?}"
        );
    }
    let nobody = Observed {
        vmms: vec![],
        ..here(Life::Silent)
    };
    assert_eq!(converge(&desired, &nobody), []);
    let over = HostDesired {
        revision: 2,
        ..HostDesired::default()
    };
    let actions = converge(&over, &here(serving(VmmState::Serving)));
    assert!(matches!(&actions[..], [Action::Destroy { .. }]), "{actions:?}");
}
