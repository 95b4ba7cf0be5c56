//! The command line, as data: what may be typed and what it means.
//!
//! Nothing here does anything; `commands` does. The verbs and options are
//! those of the contract and are never renamed.

mod gc;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use uuid::Uuid;

pub use self::gc::{GcCommand, GcScope, Switch};
use crate::reach::{OfferArgs, RemoteArgs};
use crate::size::Size;

/// Where the state lies when nobody says otherwise.
pub const STATE_DEFAULT: &str = "/var/lib/coppice";
/// Where the sockets lie when nobody says otherwise.
pub const RUN_DEFAULT: &str = "/run/coppice";

/// Virtual disks as chains of VHD images: snapshots, clones, and a garbage
/// collector that merges chains while the disks are in use.
#[derive(Debug, Parser)]
#[command(name = "coppice", version, propagate_version = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Print one JSON document on standard output, and nothing else there
    #[arg(long, global = true)]
    pub json: bool,
    /// Folder of the host's own state [default: /var/lib/coppice]
    #[arg(long, global = true, env = "COPPICE_STATE", value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Folder of the sockets, best on a tmpfs [default: /run/coppice]
    #[arg(long, global = true, env = "COPPICE_RUN", value_name = "DIR")]
    pub run: Option<PathBuf>,
}

impl Global {
    /// The run folder: as given, or the default.
    pub fn run_dir(&self) -> PathBuf {
        self.run.clone().unwrap_or_else(|| PathBuf::from(RUN_DEFAULT))
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the main job on this machine, start to end, on real I/O
    Demo(DemoArgs),
    /// Run the storage daemon and the garbage collector in the foreground
    Up(UpArgs),
    /// Say what runs: daemons, storage repositories, merges
    Status,
    /// Storage repositories
    #[command(subcommand)]
    Sr(SrCommand),
    /// Virtual disks
    #[command(subcommand)]
    Vdi(VdiCommand),
    /// The garbage collector
    #[command(subcommand)]
    Gc(GcCommand),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    Man {
        /// Folder to write them to
        dir: PathBuf,
    },
    /// Be one of the daemons; `up` and smd start this program so
    #[command(hide = true, disable_help_flag = true)]
    Daemon {
        /// smd, gcd or tapdisk, then its own arguments, handed on untouched
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

/// Options of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Folder for the images [default: a private one, deleted at the end]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Leave the storage repository and the logs in place
    #[arg(long)]
    pub keep: bool,
    /// Seed of the random requests [default: a new one, printed]
    #[arg(long)]
    pub seed: Option<u64>,
}

/// Options of `up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Folder for state and sockets: DIR/state and DIR/run
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Leave attached disks served when ending
    #[arg(long)]
    pub leave_attached: bool,
    /// Where else disks are served.
    #[command(flatten)]
    pub offer: OfferArgs,
}

/// Kind of a storage repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SrType {
    /// A folder of VHD files
    File,
    /// Logical volumes of a volume group
    Lvm,
}

impl SrType {
    /// The word the API uses.
    pub fn word(self) -> &'static str {
        match self {
            SrType::File => "file",
            SrType::Lvm => "lvm",
        }
    }
}

/// Verbs of `sr`.
#[derive(Debug, Subcommand)]
pub enum SrCommand {
    /// Make a new storage repository and attach it
    Create {
        /// Its name
        name: String,
        /// Where it lives
        #[command(flatten)]
        place: Place,
        /// Volumes grow as they are written (lvm)
        #[arg(long)]
        thin: bool,
        /// Its uuid [default: a new one]
        #[arg(long)]
        uuid: Option<Uuid>,
    },
    /// Attach a storage repository that exists already
    Introduce {
        /// Its name here
        name: String,
        /// Where it lives
        #[command(flatten)]
        place: Place,
        /// Its uuid [default: the one written there, or a new one]
        #[arg(long)]
        uuid: Option<Uuid>,
    },
    /// List the storage repositories
    List,
    /// Show one
    Show(SrArg),
    /// Draw its trees of images
    Tree {
        /// Uuid, or name where that is unique
        sr: String,
        /// Draw them again every second, until Ctrl-C; with --json one
        /// document per line
        #[arg(long)]
        watch: bool,
    },
    /// Say what lies at a path: nothing, one of ours, one of the reference's;
    /// changes nothing
    Probe(Place),
    /// Read all metadata, attached or not; names each broken image with its
    /// reason, and every leftover; changes nothing
    Check {
        /// Uuid, or name where that is unique
        sr: String,
        /// End with status 1 when an image is broken
        #[arg(long)]
        strict: bool,
    },
    /// Read all headers anew and bring the catalog up to date
    Scan(SrArg),
    /// Take it into use on this host
    Attach(SrArg),
    /// Settle everything and give it back
    Detach(SrArg),
    /// Drop it from this host; nothing on it changes
    Forget(SrArg),
    /// Delete everything of ours on it; refused while it holds disks
    Destroy(SrArg),
}

/// Where a storage repository lies.
#[derive(Debug, Clone, Args)]
pub struct Place {
    /// Its kind
    #[arg(long = "type", value_enum)]
    pub kind: SrType,
    /// The folder it lives in (file)
    #[arg(long, required_unless_present = "devices", conflicts_with = "devices")]
    pub path: Option<PathBuf>,
    /// The devices it lives on (lvm)
    #[arg(long = "device", value_name = "DEV", num_args = 1..)]
    pub devices: Vec<PathBuf>,
}

/// One storage repository.
#[derive(Debug, Args)]
pub struct SrArg {
    /// Uuid, or name where that is unique
    pub sr: String,
}

/// One disk.
#[derive(Debug, Args)]
pub struct VdiArg {
    /// Uuid, or name where that is unique
    pub vdi: String,
}

/// Form of an exported disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StreamFormat {
    /// Every byte of the disk
    Raw,
    /// A dynamic VHD, or over a base a differencing one
    Vhd,
}

impl StreamFormat {
    /// The word the API uses.
    pub fn word(self) -> &'static str {
        match self {
            StreamFormat::Raw => "raw",
            StreamFormat::Vhd => "vhd",
        }
    }
}

/// Verbs of `vdi`.
#[derive(Debug, Subcommand)]
pub enum VdiCommand {
    /// Make a new, empty disk
    Create {
        /// Storage repository
        sr: String,
        /// Its name
        name: String,
        /// Virtual size: bytes, or with KiB, MiB, GiB, TiB
        #[arg(long)]
        size: Size,
    },
    /// List disks
    List {
        /// Only those of this storage repository
        sr: Option<String>,
    },
    /// Show one
    Show(VdiArg),
    /// Take a snapshot; of several disks, all at one instant
    ///
    /// Hooks are shell commands, run here with your own rights: the first once
    /// nothing else is before the snapshot, the second as soon as the instant
    /// is over, whatever came of it. COPPICE_VDIS holds the disks' uuids. If
    /// the first fails nothing is taken.
    Snapshot {
        /// The disks
        #[arg(required = true)]
        vdis: Vec<String>,
        /// Name of the snapshot
        #[arg(long)]
        name: Option<String>,
        /// Command to run before, to freeze guests
        #[arg(long, value_name = "CMD")]
        before: Option<String>,
        /// Command to run after, to thaw them: always
        #[arg(long, value_name = "CMD")]
        after: Option<String>,
        /// Seconds each hook, and the snapshot between them, may take
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        hook_limit: u64,
    },
    /// Make a writable copy that shares everything
    Clone {
        /// The disk or snapshot
        vdi: String,
        /// Name of the clone
        #[arg(long)]
        name: Option<String>,
    },
    /// Write a disk to a file or a pipe
    ///
    /// A snapshot, or a disk that is not attached for writing. With --base only
    /// what differs from another disk, snapshot or hidden node of the same
    /// storage repository: laid over that one it reads as this one. A file gets
    /// its name when all of it is there; raw files keep their holes.
    Export {
        /// The disk
        vdi: String,
        /// Write only what differs from this one
        #[arg(long, value_name = "VDI")]
        base: Option<String>,
        /// Form of the file [default: raw for .raw and .img, else vhd]
        #[arg(long, value_enum)]
        format: Option<StreamFormat>,
        /// The file, or - for standard output
        file: PathBuf,
    },
    /// Make a new disk of a file or a pipe
    ///
    /// With --base the file is a delta, and that disk holds what it was made
    /// over; the new disk shares everything else with it. Interrupted, nothing
    /// is left.
    Import {
        /// Storage repository
        sr: String,
        /// Its name
        name: String,
        /// What the delta stands on: a snapshot, a hidden node, or a disk that
        /// was not changed since it was imported or exported
        #[arg(long, value_name = "VDI")]
        base: Option<String>,
        /// Form of the file [default: raw for .raw and .img, else vhd]
        #[arg(long, value_enum)]
        format: Option<StreamFormat>,
        /// The file, or - for standard input
        file: PathBuf,
    },
    /// Delete a disk or a snapshot
    Delete(VdiArg),
    /// Change its name
    Rename {
        /// The disk
        vdi: String,
        /// The new name
        name: String,
    },
    /// Change its size: larger at any time, smaller only without a parent and
    /// detached
    Resize {
        /// The disk
        vdi: String,
        /// Virtual size: bytes, or with KiB, MiB, GiB, TiB
        #[arg(long)]
        size: Size,
    },
    /// Take it back to one of its snapshots; what was written since is lost
    Revert {
        /// The disk, detached
        vdi: String,
        /// A snapshot of it
        #[arg(long, value_name = "SNAPSHOT")]
        to: String,
    },
    /// Copy it, as one image without a parent, to any storage repository
    Copy {
        /// The disk or snapshot, not attached for writing
        vdi: String,
        /// Storage repository
        #[arg(long, value_name = "SR")]
        to: String,
        /// Name of the copy
        #[arg(long)]
        name: Option<String>,
    },
    /// List the ranges in which it can differ from another
    Changed {
        /// The disk, snapshot or hidden node
        vdi: String,
        /// The one to compare with, of the same storage repository
        #[arg(long, value_name = "VDI")]
        since: String,
    },
    /// Show which node of its chain has which bytes, and where in its image
    Map {
        /// The disk, snapshot or hidden node
        vdi: String,
        /// First byte [default: 0]
        offset: Option<Size>,
        /// Bytes [default: to the end]
        length: Option<Size>,
    },
    /// Show what it takes, shares and could give back; what deleting it frees
    Stat(VdiArg),
    /// Serve it over NBD
    Attach {
        /// The disk
        vdi: String,
        /// Refuse writes
        #[arg(long)]
        read_only: bool,
        /// Where else.
        #[command(flatten)]
        remote: RemoteArgs,
    },
    /// Settle it and stop serving it
    Detach {
        /// The disk
        vdi: String,
        /// Disconnect clients first
        #[arg(long)]
        force: bool,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn settings_out_of_range_or_none_at_all_are_wrong_usage() {
        let set = |more: &[&str]| Cli::try_parse_from([&["coppice", "gc", "set", "store"], more].concat());
        for more in [
            &["--parallel", "999"][..],
            &["--parallel", "x"],
            &["--latency-factor", "1e9"],
            &["--latency-factor", "nan"],
            &["--latency-factor=-1"],
            &[],
        ] {
            let error = set(more).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{more:?}: {error}");
        }
        for more in
            [&["--parallel", "16", "--rate", "1MiB"][..], &["--latency-factor", "0"], &["--receipts", "on"]]
        {
            assert!(set(more).is_ok(), "{more:?}");
        }
    }

    #[test]
    fn a_daemon_gets_its_options_untouched() {
        let line = ["coppice", "daemon", "smd", "--run", "/x", "--help"];
        let Command::Daemon { args } = Cli::try_parse_from(line).unwrap().command else {
            panic!("not a daemon")
        };
        assert_eq!(args, ["smd", "--run", "/x", "--help"]);
    }
}
