//! Whoever else finds the port on which a target waits.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use drover_chaos_cluster::cluster::CLUSTER_ID;
use drover_pki::{ClusterCa, Credentials, Role, TlsFiles, host_dns};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use super::*;

/// A peer that neither answers nor hangs up is left after this.
const PATIENCE: Duration = Duration::from_secs(3);

fn connect(addr: &str) -> TcpStream {
    let stream = TcpStream::connect(addr).expect("the target listens");
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("a socket has a time limit");
    stream
}

/// Says `words` over TLS under an identity, and waits until the target hangs up.
fn say(addr: &str, files: &TlsFiles, target: usize, words: &[u8]) {
    let credentials = Credentials::load(files, CLUSTER_ID).expect("sound files");
    let name = ServerName::try_from(host_dns(&host_name(target))).expect("a DNS name");
    let tls = ClientConnection::new(credentials.rustls_client(), name).expect("TLS settings");
    let mut stream = StreamOwned::new(tls, connect(addr));
    // A peer that was refused sees that as a failed write or read: both are the end that is wanted.
    let _ = stream.write_all(words).and_then(|()| stream.flush());
    let _ = stream.read(&mut [0; 256]);
}

#[test]
fn strangers_on_the_migration_port_do_not_disturb_a_migration() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let (source, epoch) = cluster.await_runs_exactly_once(VM);
    let target = next(source);
    cluster.hold("source.before_connect");
    let planned = migrate_on(&cluster, source);
    cluster.await_reached("source.before_connect");
    let addr = cluster
        .client
        .migration(&planned.id)
        .expect("the migration is known")
        .target_addr;

    let mut raw = connect(&addr);
    raw.write_all(&[0x5a; 3000]).expect("the socket takes bytes");
    let _ = raw.read(&mut [0; 64]);
    let stranger = ClusterCa::create(CLUSTER_ID)
        .and_then(|ca| {
            ca.issue_to(
                &cluster.scratch().join("stranger"),
                Role::Host,
                &host_name(source),
            )
        })
        .expect("a certificate of another CA");
    say(&addr, &stranger, target, b"let me in");
    let bystander = cluster
        .issue(Role::Host, &host_name(next(target)))
        .expect("a certificate");
    say(&addr, &bystander, target, b"let me in");
    drop(connect(&addr));

    cluster.release("source.before_connect");
    assert_done(&cluster.client.await_end(&planned.id));
    assert_eq!(cluster.await_runs_exactly_once(VM), (target, epoch + 1));
    assert_sound_at_the_end(&cluster, &mut console);
}

#[test]
fn a_source_that_talks_nonsense_is_answered_by_an_abort_and_the_vm_runs_on() {
    let Some(cluster) = cluster() else { return };
    let mut console = boot(&cluster, 1, STEADY);
    let mut lying = vec![0xff; 64];
    lying.extend_from_slice(&[0; 64]);
    for (what, words) in [
        ("noise", vec![0x5a; 4096]),
        ("a length that lies", lying),
        ("half a frame", vec![0; 3]),
    ] {
        eprintln!("a source that sends {what}");
        let (source, epoch) = cluster.await_runs_exactly_once(VM);
        cluster.hold("source.before_connect");
        let planned = migrate_on(&cluster, source);
        cluster.await_reached("source.before_connect");
        let addr = cluster
            .client
            .migration(&planned.id)
            .expect("the migration is known")
            .target_addr;
        let files = cluster
            .issue(Role::Host, &host_name(source))
            .expect("a certificate");
        say(&addr, &files, next(source), &words);
        cluster.release("source.before_connect");
        let ended = cluster.client.await_end(&planned.id);
        // The target may have given up on the migration, or on that connection only.
        if ended.phase() == MigrationPhase::Done {
            assert_eq!(
                cluster.await_runs_exactly_once(VM),
                (next(source), epoch + 1),
                "{what}"
            );
        } else {
            assert_aborted(
                &ended,
                &["bad_frame", "protocol_version", "link_lost", "target_failed"],
            );
            assert_eq!(cluster.await_runs_exactly_once(VM), (source, epoch), "{what}");
        }
        console.ping(&cluster.client, &format!("after-{epoch}"));
    }
    assert_sound_at_the_end(&cluster, &mut console);
}
