//! What guests may send: an nftables table of family bridge, by the program `nft`.
//!
//! ```text
//!   frame from a TAP of ours ── its own chain: source MAC; ARP and IPv4 of its own address ──► the bridge learns and forwards
//!                            └─ a TAP that has none: dropped
//! ```
//!
//! The whole table is written anew in one transaction, so there is nothing to compare and no moment without rules. Rules accept what
//! is known to be right and drop the rest: what cannot be looked into (a VLAN tag, another hardware type of ARP) does not pass where
//! an address is to be kept. They stand before the bridge learns where a MAC is (prerouting).
//!
//! `nft` and not netlink by hand: what it compiles a rule to is a language of its own, and it is tested by more people.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use super::plan::{Names, Nic};

/// One run of `nft`, which takes milliseconds.
const NFT_MAX: Duration = Duration::from_secs(5);
/// What is told of what it says, characters.
const SAID_MAX: usize = 200;

/// The table for these NICs, as a script that replaces the one before it; without any NIC one that removes it.
pub fn script<'a>(names: &Names, nics: impl Iterator<Item = &'a Nic> + Clone) -> String {
    let table = format!("drover_{}", names.prefix());
    let remove = format!("table bridge {table}\ndelete table bridge {table}\n");
    let chains: String = nics.clone().map(chain).collect();
    if chains.is_empty() {
        return remove;
    }
    let jumps: Vec<String> = nics.map(|nic| format!("\"{0}\" : jump {0}", nic.tap)).collect();
    format!(
        "{remove}table bridge {table} {{\n{chains}\
         \tchain from_guests {{\n\
         \t\ttype filter hook prerouting priority -300; policy accept;\n\
         \t\tiifname vmap {{ {} }}\n\
         \t\tiifname \"{}*\" drop\n\
         \t}}\n}}\n",
        jumps.join(", "),
        names.tap_prefix()
    )
}

fn chain(nic: &Nic) -> String {
    let mac = nic.mac_text();
    let rules = match (nic.allow_spoofing, nic.ip) {
        // Its TAP is on no bridge; should anybody put it on one, it says nothing there.
        _ if nic.unplugged => "drop".to_owned(),
        (true, _) => "accept".to_owned(),
        (false, None) => format!(
            "ether saddr != {mac} drop\n\
             \t\tether type arp arp saddr ether {mac} accept\n\
             \t\tether type arp drop\n\
             \t\taccept"
        ),
        // An ARP probe and a DHCP client have no address yet (RFC 5227, 1.1; RFC 2131, 4.1). 0x8035 is reverse ARP, by which a VMM tells
        // where a MAC is now. IPv6 addresses are not given out by the cluster.
        (false, Some(ip)) => format!(
            "ether saddr != {mac} drop\n\
             \t\tether type arp arp saddr ether {mac} arp saddr ip {{ {ip}, 0.0.0.0 }} accept\n\
             \t\tether type ip ip saddr {ip} accept\n\
             \t\tether type ip ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept\n\
             \t\tether type {{ ip6, 0x8035 }} accept\n\
             \t\tdrop"
        ),
    };
    format!("\tchain {} {{\n\t\t{rules}\n\t}}\n", nic.tap)
}

/// Has `nft` take the script; with `check` it only says whether it would.
///
/// # Errors
/// The program is missing, hangs, or refuses: with what it said.
pub async fn apply(script: &str, check: bool) -> io::Result<()> {
    let mut nft = Command::new("nft")
        .args(check.then_some("--check"))
        .args(["--file", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("the program nft (package nftables): {error}"),
            )
        })?;
    let mut stdin = nft.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let run = async {
        // One that ends before it has read says why.
        let _ = stdin.write_all(script.as_bytes()).await;
        drop(stdin);
        nft.wait_with_output().await
    };
    let ended = timeout(NFT_MAX, run)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "nft does not end"))??;
    if ended.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&ended.stderr);
    let said: String = said
        .lines()
        .next()
        .unwrap_or_default()
        .chars()
        .take(SAID_MAX)
        .collect();
    Err(io::Error::other(format!("nft: {} ({said})", ended.status)))
}
