//! A virtual machine in which a tapdisk serves a disk over TCP, so that its
//! power can be cut. Software emulation unless told otherwise: some seconds
//! per boot.
//!
//! ```text
//!   test ── Unix socket ── forwarder ── TCP ── qemu ══ tapdisk ── ext4 ── file
//! ```

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use super::host::Attached;
use super::programs::{coppice, run};

/// Longest time to boot and to serve.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// Where the tapdisk listens inside.
const PORT: u16 = 10809;
/// What a minimal kernel has as modules, in the order they need each other.
const MODULES: [&str; 10] = [
    "virtio_ring.ko",
    "virtio.ko",
    "virtio_pci_modern_dev.ko",
    "virtio_pci_legacy_dev.ko",
    "virtio_pci.ko",
    "virtio_blk.ko",
    "failover.ko",
    "net_failover.ko",
    "virtio_net.ko",
    "ext4.ko",
];

/// What machines are made from.
#[derive(Debug)]
pub struct Parts {
    kernel: PathBuf,
    initrd: PathBuf,
    folder: PathBuf,
}

impl Parts {
    /// An initial file system with busybox, the modules that are there, and
    /// `coppice`, which runs a tapdisk on the leaf called `leaf`. The folder
    /// `vm` has `vmlinuz` and `modules/`, as a distribution's kernel package
    /// brings them.
    pub fn new(vm: &Path, folder: &Path, leaf: &str) -> Self {
        let root = folder.join("initrd");
        for name in ["bin", "proc", "sys", "dev", "run", "sr", "modules"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        let found = run(Command::new("sh").args(["-c", "command -v busybox"]));
        std::fs::copy(found.trim(), root.join("bin/busybox")).unwrap();
        std::fs::copy(coppice(), root.join("bin/coppice")).unwrap();
        for line in run(Command::new("ldd").arg(coppice())).lines() {
            if let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) {
                let to = root.join(library.trim_start_matches('/'));
                std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                std::fs::copy(library, to).unwrap();
            }
        }
        let mut insmod = String::new();
        let files = run(Command::new("find").arg(vm.join("modules")).args(["-name", "*.ko"]));
        for module in MODULES {
            // What is not there is built in.
            if let Some(file) = files.lines().find(|file| file.ends_with(&format!("/{module}"))) {
                std::fs::copy(file, root.join("modules").join(module)).unwrap();
                insmod += &format!("insmod /modules/{module}\n");
            }
        }
        let init = root.join("init");
        std::fs::write(&init, init_script(&insmod, leaf)).unwrap();
        let initrd = folder.join("initrd.cpio");
        let pack = format!("find . | cpio --quiet -o -H newc > {}", initrd.display());
        run(Command::new("chmod").arg("755").arg(&init));
        run(Command::new("sh").args(["-c", &pack]).current_dir(&root));
        Self { kernel: vm.join("vmlinuz"), initrd, folder: folder.to_owned() }
    }

    /// Boots a machine on `disk`; returns once its tapdisk serves.
    pub fn boot(&self, disk: &Path) -> Machine {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "512", "-nodefaults"])
            .args(["-display", "none", "-serial", "stdio", "-no-reboot"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", "console=ttyS0 quiet panic=-1 net.ifnames=0"])
            .arg("-drive")
            .arg(format!("file={},format=raw,if=virtio,cache=none", disk.display()))
            .args(["-device", "virtio-net-pci,netdev=n,romfile=", "-netdev"])
            .arg(format!("user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{PORT}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let console = BufReader::new(qemu.stdout.take().unwrap());
        let (said, heard) = channel();
        std::thread::spawn(move || {
            for line in console.lines().map_while(Result::ok) {
                eprintln!("machine: {line}");
                let _ = said.send(line); // nobody listens once it is up
            }
        });
        let mut machine = Machine { qemu, at: self.at(port) };
        let deadline = std::time::Instant::now() + BOOT_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            match heard.recv_timeout(left) {
                Ok(line) if line.contains("\"ready\":true") => return machine,
                Ok(_) => {}
                Err(error) => {
                    machine.cut();
                    panic!("the machine does not serve: {error}");
                }
            }
        }
    }

    /// A Unix socket that leads to the TCP port.
    fn at(&self, port: u16) -> Attached {
        let socket = self.folder.join(format!("nbd-{port}.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                let _ = server.set_nodelay(true); // slower without, no more
                forward(client, server);
            }
        });
        Attached {
            uri: format!("nbd+unix:///disk?socket={}", socket.display()),
            socket,
            export: "disk".to_owned(),
            pid: 0,
        }
    }
}

/// Passes bytes both ways until either side ends.
fn forward(client: UnixStream, server: TcpStream) {
    let (mut to_server, mut from_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let (mut from_server, mut to_client) = (server, client);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server); // ends with either side
        let _ = to_server.shutdown(Shutdown::Both);
    });
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_server, &mut to_client);
        let _ = to_client.flush();
        let _ = to_client.shutdown(Shutdown::Both);
    });
}

fn init_script(insmod: &str, leaf: &str) -> String {
    let id = uuid::Uuid::nil();
    format!(
        "#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
{insmod}
mount -t ext4 /dev/vda /sr
ifconfig lo 127.0.0.1
ifconfig eth0 10.0.2.15
mkdir /run/tap /run/records
exec /bin/coppice daemon tapdisk --sr-path /sr --volume {leaf} --vdi {id} --sr {id} --export disk \\
  --run /run/tap --records /run/records --boot-id $(cat /proc/sys/kernel/random/uuid) --epoch 1 \\
  --listen 0.0.0.0:{PORT} --insecure
"
    )
}

/// A running machine.
#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    /// Where its disk is served.
    pub at: Attached,
}

impl Machine {
    /// Cuts its power.
    pub fn cut(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.cut();
    }
}
