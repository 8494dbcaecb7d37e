//! `ctl migrate … --dry-run`: what it prints, and the exit codes that scripts go by.

use drover_proto::v1;

use crate::fake::Fake;

fn told() -> v1::MigrationForecast {
    v1::MigrationForecast {
        vm: "vm1".into(),
        from: "host1".into(),
        to: "host2".into(),
        findings: vec![v1::Finding {
            check: "host_up".into(),
            passed: true,
            message: "host2 is up".into(),
            code: String::new(),
        }],
        forecast: Some(v1::Forecast {
            converges: true,
            max_downtime_ms: 100,
            total_ms: 1_200,
            blackout_us: 30_000,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn reason(code: &str) -> Option<v1::Reason> {
    Some(v1::Reason {
        code: code.into(),
        message: "so it is".into(),
    })
}

#[test]
fn a_dry_run_ends_as_the_migration_would_and_starts_none() {
    let fake = Fake::start();
    let outcome = |forecast: v1::MigrationForecast| {
        fake.state().forecast = Some(forecast);
        fake.run("migrate vm1 host2 --dry-run -o json")
    };
    let works = outcome(told());
    assert_eq!(works.code, Some(0), "{works:?}");
    assert_eq!(works.json()["works"], true);

    let mut stuck = told();
    let forecast = stuck.forecast.get_or_insert_default();
    forecast.converges = false;
    forecast.reason = reason("no_convergence");
    let stuck = outcome(stuck);
    assert_eq!(stuck.code, Some(6), "{stuck:?}");
    assert_eq!(stuck.json()["forecast"]["reason"]["code"], "no_convergence");

    for (code, exit) in [
        ("no_host_fits", 4),
        ("host_not_found", 3),
        ("invalid_argument", 2),
    ] {
        let refused = outcome(v1::MigrationForecast {
            refusal: reason(code),
            forecast: None,
            ..told()
        });
        assert_eq!(refused.code, Some(exit), "{refused:?}");
        assert_eq!(
            refused.json()["refusal"]["code"],
            code,
            "the findings are shown all the same"
        );
        assert!(refused.stderr.contains(code));
    }
    let unknown = outcome(v1::MigrationForecast {
        unknown: reason("host_unreachable"),
        forecast: None,
        ..told()
    });
    assert_eq!(unknown.code, Some(5), "{unknown:?}");
    assert_eq!(fake.calls("migrate_vm"), 0, "a dry run moves nothing");
    assert_eq!(fake.run("migrate vm9 host2 --dry-run --detach").code, Some(2));
}

#[test]
fn a_dry_run_is_a_table_of_findings_and_figures() {
    let fake = Fake::start();
    fake.state().forecast = Some(told());
    let shown = fake.run("migrate vm1 host2 --dry-run");
    for line in ["ok", "host_up: host2 is up", "converges below 100 ms", "30"] {
        assert!(shown.stdout.contains(line), "{line:?} is not in {}", shown.stdout);
    }
    assert_eq!(fake.run("migrate vm1 host2 --dry-run --quiet").stdout, "");
}
