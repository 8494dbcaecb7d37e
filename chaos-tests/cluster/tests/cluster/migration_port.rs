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

/// Says `words` over TLS under an identity; waits for an answer, or hangs up in the middle.
fn say(addr: &str, files: &TlsFiles, target: usize, words: &[u8], wait: bool) {
    let credentials = Credentials::load(files, CLUSTER_ID).expect("sound files");
    let name = ServerName::try_from(host_dns(&host_name(target))).expect("a DNS name");
    let tls = ClientConnection::new(credentials.rustls_client(), name).expect("TLS settings");
    let mut stream = StreamOwned::new(tls, connect(addr));
    // A peer that was refused sees that as a failed write or read: both are the end that is wanted.
    let _ = stream.write_all(words).and_then(|()| stream.flush());
    if wait {
        let _ = stream.read(&mut [0; 256]);
    }
}

/// A frame's header, see `drover_migration::codec`: a hello that announces `length` bytes.
fn header(length: u32) -> Vec<u8> {
    let mut header = b"DRVM\x01\x01\0\0".to_vec();
    header.extend_from_slice(&0u64.to_le_bytes());
    header.extend_from_slice(&length.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header
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
    say(&addr, &stranger, target, b"let me in", true);
    let bystander = cluster
        .issue(Role::Host, &host_name(next(target)))
        .expect("a certificate");
    say(&addr, &bystander, target, b"let me in", true);
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
    let half = [header(100), vec![0; 3]].concat();
    let cases = [
        ("noise", vec![0x5a; 4096], true),
        ("a length beyond every bound", header(u32::MAX), true),
        (
            "a length that is not its own",
            [header(8), vec![0; 100]].concat(),
            true,
        ),
        ("half a frame", half, false),
    ];
    for (what, words, wait) in cases {
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
        say(&addr, &files, next(source), &words, wait);
        cluster.release("source.before_connect");
        let ended = cluster.client.await_end(&planned.id);
        // Either side reports what it saw of it first.
        assert_aborted(&ended, &["bad_frame", "link_lost"]);
        assert_eq!(cluster.await_runs_exactly_once(VM), (source, epoch), "{what}");
        console.ping(&cluster.client, what);
    }
    assert_sound_at_the_end(&cluster, &mut console);
}
