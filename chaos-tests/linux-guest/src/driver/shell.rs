//! The guest's shell, typed to and read through the VMM's console.
//!
//! The terminal echoes what is typed, so each command prints its answer after a marker that only exists once the shell has
//! expanded it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use drover_linux_guest::report::{Asked, DeviceFacts, GuestFacts};
use drover_proto::v1::vmm_client::VmmClient;
use drover_proto::v1::{ReadConsoleRequest, WriteConsoleRequest};
use tokio::time::{Instant, sleep};
use tonic::transport::Channel;

use crate::net;
use crate::vmm::{Vmm, boottime};

const PROMPT: &str = "guest-shell> ";
const ANSWER_MAX: Duration = Duration::from_secs(90);
const READ_WAIT_MS: u32 = 2000;
/// Where blocks of 64 KiB are written again and again, behind the file: the first, and how many.
const WRITES_AT: u32 = 128;
const PLACES: u32 = 16;
const RETRY: Duration = Duration::from_millis(100);
/// What of the console an error shows, characters.
const TAIL_CHARS: usize = 4000;

/// A conversation with the guest.
pub struct Shell {
    client: VmmClient<Channel>,
    offset: u64,
    seen: String,
    asked: u32,
}

impl Shell {
    /// The shell of the guest that `vmm` runs; reading begins at the oldest byte its console keeps.
    pub fn of(vmm: &Vmm) -> Self {
        Self {
            client: vmm.client(),
            offset: 0,
            seen: String::new(),
            asked: 0,
        }
    }

    /// Goes on at the VMM that the guest has moved to: the console's offsets go on with it.
    pub fn follow(&mut self, vmm: &Vmm) {
        self.client = vmm.client();
    }

    /// Goes on at a guest that is what it was before: its console begins with what was printed by then, and the commands' numbers go on.
    pub fn go_back_to(&mut self, vmm: &Vmm) {
        self.client = vmm.client();
        self.offset = 0;
        self.seen.clear();
    }

    /// Waits for the shell to ask for a command.
    pub async fn wait_for_prompt(&mut self, limit: Duration) -> Result<()> {
        self.read_past(PROMPT, limit).await.map(drop)
    }

    /// Has the guest keep 8 MiB of random bytes in memory.
    pub async fn write_random_file(&mut self) -> Result<()> {
        self.ask("dd if=/dev/urandom of=/tmp/file bs=1M count=8 2>/dev/null; ls /tmp")
            .await
            .map(drop)
    }

    /// Asks the guest about itself; and when it was asked for the time.
    pub async fn facts(&mut self) -> Result<(GuestFacts, Asked)> {
        let typed = boottime()?;
        let times = self.ask("echo $(cat /proc/uptime) $(date +%s)").await?;
        let answered = boottime()?;
        let asked = Asked {
            typed_ns: typed.as_nanos().try_into()?,
            answered_ns: answered.as_nanos().try_into()?,
        };
        // Uptime, idle time, time of day.
        let mut words = times.split_whitespace();
        let hundredths = words.next().unwrap_or_default().replace('.', "");
        let wall = words.nth(1).unwrap_or_default();
        let facts = GuestFacts {
            release: self.ask("uname -r").await?,
            shell_pid: self.number("echo $$").await?,
            uptime_cs: hundredths
                .parse()
                .with_context(|| format!("the uptime in {times:?}"))?,
            wall_s: wall
                .parse()
                .with_context(|| format!("the time of day in {times:?}"))?,
            clock_source: self
                .ask("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
                .await?,
            digest: self.file_digest().await?,
            complaints: self
                .number("dmesg | grep -c -E 'Oops|Kernel panic|BUG:|lockup|stalls on'")
                .await?,
            cpus: self.number("nproc").await?,
            terminal: self.ask("tty").await?,
            devices: self.devices().await?,
        };
        Ok((facts, asked))
    }

    async fn file_digest(&mut self) -> Result<String> {
        self.ask("md5sum </tmp/file").await
    }

    /// The digest of what is on the disk, read past the cache.
    async fn disk_digest(&mut self) -> Result<String> {
        self.ask("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M count=8 2>/dev/null | md5sum")
            .await
    }

    /// What the guest has in memory and on its disk: their digests.
    pub async fn contents(&mut self) -> Result<[String; 2]> {
        Ok([self.file_digest().await?, self.disk_digest().await?])
    }

    /// Echoes of the host that come back, of three.
    pub async fn echoes(&mut self) -> Result<u64> {
        self.number(&format!("ping -c 3 -W 20 {} | grep -c 'bytes from'", net::HOST))
            .await
    }

    /// Begins to write blocks to the disk, each another and as far as the medium, and counts those that are there.
    pub async fn begin_writes(&mut self) -> Result<()> {
        let line = format!(
            "echo 0 >/tmp/count; (n=0; while test ! -e /tmp/stop; do \
             (echo $n; cat /tmp/block) | dd of=/dev/vda bs=64k count=1 iflag=fullblock seek=$(({WRITES_AT}+n%{PLACES})) conv=notrunc,fsync 2>/dev/null || break; \
             n=$((n+1)); echo $n >/tmp/count.new; mv /tmp/count.new /tmp/count; done; echo ended >/tmp/wrote) & true"
        );
        self.ask(&line).await.map(drop)
    }

    /// Waits until at least so many blocks were written; how many there are.
    pub async fn written(&mut self, least: u64) -> Result<u64> {
        self.number(&format!(
            "while test $(cat /tmp/count) -lt {least} && test ! -e /tmp/wrote; do usleep 200000; done; cat /tmp/count"
        ))
        .await
    }

    /// Once the writing has ended: how many were written, and how many of the newest in each place are not there, read past the cache.
    pub async fn lost_writes(&mut self) -> Result<[u64; 2]> {
        let line = format!(
            "while test ! -e /tmp/wrote; do usleep 200000; done; echo 3 >/proc/sys/vm/drop_caches; n=$(cat /tmp/count); lost=0; i=$((n>{PLACES}?n-{PLACES}:0)); \
             while test $i -lt $n; do want=$( (echo $i; cat /tmp/block) | head -c 65536 | md5sum); \
             got=$(dd if=/dev/vda bs=64k count=1 skip=$(({WRITES_AT}+i%{PLACES})) 2>/dev/null | md5sum); \
             test \"$want\" = \"$got\" || lost=$((lost+1)); i=$((i+1)); done; echo $n $lost"
        );
        let answer = self.ask(&line).await?;
        let mut numbers = answer.split(' ').map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(written)), Some(Ok(lost))) => Ok([written, lost]),
            _ => bail!("the guest says {answer:?} of what it wrote"),
        }
    }

    /// Makes a file system on the disk and puts there what a guest needs to boot from it, and its file.
    pub async fn install(&mut self) -> Result<()> {
        let answer = self
            .ask(
                "mkdir -p /tmp/disk && mke2fs /dev/vda >/dev/null 2>&1 && mount -t ext4 /dev/vda /tmp/disk && cd /tmp/disk && mkdir bin sbin && \
                 cp /bin/busybox bin/ && ln -s busybox bin/sh && cp /installed/init sbin/ && cp /tmp/file file && cd / && umount /tmp/disk && echo ok",
            )
            .await?;
        if answer != "ok" {
            let log = self.ask("dmesg | tail -20").await?;
            bail!("the guest cannot be put on its disk: {answer:?}; {log}");
        }
        Ok(())
    }

    /// The root's device and file system.
    pub async fn root(&mut self) -> Result<String> {
        self.ask("sed -n 's,^\\([^ ]*\\) / \\([^ ]*\\) .*,\\1 \\2,p' /proc/mounts | tail -1")
            .await
    }

    /// The digest of the file that was put on the disk that is the root now.
    pub async fn installed_digest(&mut self) -> Result<String> {
        self.ask("md5sum </file").await
    }

    /// Writes the file to the disk, as far as its medium.
    pub async fn write_disk(&mut self) -> Result<()> {
        let answer = self
            .ask("test -b /dev/vda && dd if=/tmp/file of=/dev/vda bs=1M conv=fsync 2>/dev/null && echo ok")
            .await?;
        if answer != "ok" {
            let log = self
                .ask("lsmod; dmesg | grep -i -E 'pci|virtio|acpi' | tail -60")
                .await?;
            bail!("the disk cannot be written: {answer:?}; modules and the kernel's log: {log}");
        }
        Ok(())
    }

    /// Waits for the second disk, which comes while the guest runs, and writes the file to it.
    pub async fn use_second_disk(&mut self) -> Result<()> {
        let found =
            "for i in $(seq 100); do test -b /dev/vdc && break; usleep 100000; done; test -b /dev/vdc";
        let answer = self
            .ask(&format!(
                "{found} && dd if=/tmp/file of=/dev/vdc bs=1M conv=fsync 2>/dev/null && echo ok"
            ))
            .await?;
        if answer != "ok" {
            let log = self
                .ask("ls /sys/bus/pci/slots; cat /proc/interrupts; grep . /sys/firmware/acpi/interrupts/*1 /sys/firmware/acpi/interrupts/sci; dmesg | grep -i -E 'pci|acpi' | tail -60")
                .await?;
            bail!("the disk that was attached cannot be written: {answer:?}; {log}");
        }
        Ok(())
    }

    /// The seed disk: label and type in its first sector, then what the guest's kernel makes of it, read past the cache, each file's name and content.
    pub async fn seed(&mut self) -> Result<[String; 2]> {
        let volume = self
            .ask("dd if=/dev/vdb bs=1 skip=43 count=19 2>/dev/null; echo")
            .await?;
        let files = "echo 3 >/proc/sys/vm/drop_caches; mkdir -p /tmp/seed; mount -t vfat -o ro /dev/vdb /tmp/seed && cd /tmp/seed && grep . *; cd /; umount /tmp/seed";
        Ok([volume, self.ask(files).await?.replace('\r', "")])
    }

    /// Gives the NIC its address.
    pub async fn set_up_network(&mut self) -> Result<()> {
        let line = format!(
            "ip addr add {}/24 dev eth0 && ip link set eth0 up && echo ok",
            net::GUEST
        );
        let answer = self.ask(&line).await?;
        if answer != "ok" {
            let log = self
                .ask("lsmod; dmesg | grep -i -E 'pci|virtio|eth' | tail -60")
                .await?;
            bail!("the NIC cannot be set up: {answer:?}; modules and the kernel's log: {log}");
        }
        Ok(())
    }

    /// Waits for the second NIC, which comes while the guest runs, and gives it its address.
    pub async fn use_second_nic(&mut self) -> Result<()> {
        let found = "for i in $(seq 100); do test -e /sys/class/net/eth1 && break; usleep 100000; done";
        let address = net::LATE_GUEST;
        let answer = self
            .ask(&format!(
                "{found}; ip addr add {address}/24 dev eth1 && ip link set eth1 up && cat /sys/class/net/eth1/address"
            ))
            .await?;
        if answer != net::LATE_MAC {
            let log = self
                .ask("ls /sys/class/net /sys/bus/pci/slots; dmesg | grep -i -E 'pci|virtio|eth' | tail -60")
                .await?;
            bail!("the NIC that was attached cannot be set up: {answer:?}; {log}");
        }
        Ok(())
    }

    /// Echoes of the host that come back over the second NIC, of three.
    pub async fn second_echoes(&mut self) -> Result<u64> {
        self.number(&format!(
            "ping -c 3 -W 20 -I eth1 {} | grep -c 'bytes from'",
            net::LATE_HOST
        ))
        .await
    }

    /// Whether the guest has a second NIC.
    pub async fn has_second_nic(&mut self) -> Result<bool> {
        Ok(self.ask("test -e /sys/class/net/eth1 && echo yes").await? == "yes")
    }

    /// The digest of what is on the second disk, read past the cache.
    pub async fn second_disk(&mut self) -> Result<String> {
        self.ask("echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vdc bs=1M count=8 2>/dev/null | md5sum")
            .await
    }

    /// Memory that the guest has available, KiB.
    pub async fn available_kib(&mut self) -> Result<u64> {
        self.number("sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")
            .await
    }

    /// The features that the balloon's driver has accepted, bit 0 first, as digits.
    pub async fn balloon_features(&mut self) -> Result<String> {
        self.ask("cat /sys/bus/virtio/drivers/virtio_balloon/virtio*/features")
            .await
    }

    /// The power state of a slot.
    pub async fn slot_power(&mut self, slot: u32) -> Result<String> {
        self.ask(&format!("cat /sys/bus/pci/slots/{slot}/power")).await
    }

    /// Whether the guest has a second disk.
    pub async fn has_second_disk(&mut self) -> Result<bool> {
        Ok(self.ask("test -e /sys/block/vdc && echo yes").await? == "yes")
    }

    /// The first disk's size, sectors.
    pub async fn sectors(&mut self) -> Result<u64> {
        self.number("cat /sys/block/vda/size").await
    }

    /// Has the guest power off at the next event of its button.
    pub async fn heed_button(&mut self) -> Result<()> {
        let name = self.ask("cat /sys/class/input/event0/device/name").await?;
        if name != "Power Button" {
            bail!("the guest's input is {name:?}, its power button is due");
        }
        // Open before the answer: an event that comes earlier reaches nobody.
        self.ask("exec 9</dev/input/event0; { dd of=/dev/null bs=24 count=1 <&9 2>/dev/null; poweroff -f; } & true")
            .await
            .map(drop)
    }

    /// How far a guest has come that does not shut down: whether it still answers, what it heard of its button, and what it does.
    pub async fn power_state(&mut self) -> Result<String> {
        self.ask(
            "grep . /sys/firmware/acpi/interrupts/sci /sys/firmware/acpi/interrupts/ff_pwr_btn; grep acpi /proc/interrupts; ps; dmesg | tail -20",
        )
        .await
    }

    /// Begins to send the same block of random bytes to the host again and again, and to take what the host sends.
    pub async fn begin_stream(&mut self) -> Result<()> {
        let (host, port, kib) = (net::HOST, net::PORT, net::BLOCK_BYTES >> 10);
        let line = format!(
            "dd if=/dev/urandom of=/tmp/block bs=1k count={kib} 2>/dev/null; \
             (while test ! -e /tmp/stop; do cat /tmp/block; done | nc {host} {port} | md5sum >/tmp/came) & true"
        );
        self.ask(&line).await.map(drop)
    }

    /// Sends no further block.
    pub async fn end_stream(&mut self) -> Result<()> {
        self.ask("touch /tmp/stop").await.map(drop)
    }

    /// Once both ways of the stream have ended: the digests of the block that was sent, and of what came.
    pub async fn stream_digests(&mut self) -> Result<[String; 2]> {
        Ok([
            self.ask("md5sum </tmp/block").await?,
            self.ask("while test ! -s /tmp/came; do sleep 1; done; cat /tmp/came")
                .await?,
        ])
    }

    async fn devices(&mut self) -> Result<DeviceFacts> {
        Ok(DeviceFacts {
            sectors: self.number("cat /sys/block/vda/size").await?,
            serial: self.ask("cat /sys/block/vda/serial").await?,
            digest: self.disk_digest().await?,
            message_lines: self
                .number("grep -c 'PCI-MSI.*virtio1-req' /proc/interrupts")
                .await?,
            random: self.ask("cat /sys/class/misc/hw_random/rng_current").await?,
            nic: self
                .ask("cd /sys/class/net/eth0; echo $(cat address mtu) $(basename $(readlink device/driver)); cd /")
                .await?,
            nic_features: self.ask("cat /sys/class/net/eth0/device/features").await?,
            echoes: self.echoes().await?,
        })
    }

    async fn number(&mut self, command: &str) -> Result<u64> {
        let answer = self.ask(command).await?;
        answer
            .parse()
            .with_context(|| format!("{command} answered {answer:?}"))
    }

    /// Types a command and returns what it printed.
    async fn ask(&mut self, command: &str) -> Result<String> {
        self.asked += 1;
        let id = self.asked;
        // Echoed as `$((40+id))`, printed as the sum: the echo is never taken for the answer.
        let number = 40 + id;
        self.type_line(&format!(
            "echo begin-$((40+{id})); {command}; echo end-$((40+{id}))"
        ))
        .await?;
        self.read_past(&format!("begin-{number}"), ANSWER_MAX).await?;
        let text = self.read_past(&format!("end-{number}"), ANSWER_MAX).await?;
        Ok(text.trim().to_owned())
    }

    async fn type_line(&mut self, line: &str) -> Result<()> {
        let mut data = line.as_bytes().to_vec();
        data.push(b'\n');
        let deadline = Instant::now() + ANSWER_MAX;
        while !data.is_empty() {
            let request = WriteConsoleRequest {
                data: data.clone(),
                ..WriteConsoleRequest::default()
            };
            let accepted = self
                .client
                .write_console(request)
                .await
                .context("typing")?
                .into_inner()
                .accepted;
            data.drain(..usize::try_from(accepted)?.min(data.len()));
            if accepted == 0 {
                if Instant::now() > deadline {
                    bail!("the guest takes no input");
                }
                sleep(RETRY).await;
            }
        }
        Ok(())
    }

    /// Reads up to and with `needle`; returns what stood before it.
    async fn read_past(&mut self, needle: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.seen.find(needle) {
                let before = self.seen[..at].to_owned();
                self.seen.drain(..at + needle.len());
                return Ok(before);
            }
            if Instant::now() > deadline {
                let skipped = self.seen.chars().count().saturating_sub(TAIL_CHARS);
                let tail: String = self.seen.chars().skip(skipped).collect();
                bail!("waited {limit:?} for {needle:?}; the console shows: {tail}");
            }
            let request = ReadConsoleRequest {
                offset: self.offset,
                wait_ms: READ_WAIT_MS,
                ..ReadConsoleRequest::default()
            };
            let answer = self
                .client
                .read_console(request)
                .await
                .context("reading the console")?
                .into_inner();
            self.offset = answer.next_offset;
            self.seen.push_str(&String::from_utf8_lossy(&answer.data));
        }
    }
}
