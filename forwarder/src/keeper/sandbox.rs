//! What the data plane gives up before it looks at the first packet: everything.
//!
//! In order: user and groups, capabilities (the bounding set too), any way to gain new ones, files outside the state
//! directory, and system calls that it does not need. Called by the only thread there is then; all later
//! threads inherit it. Workers narrow their system calls further ([`restrict_worker`]).

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use rustix::process::{Pid, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::account::Account;

/// Gives up user, groups and capabilities, and ties the life of this process to the keeper's.
///
/// A keeper that is not root but has the capabilities keeps its user: there is nothing to change to.
///
/// # Errors
/// The kernel refused a step; the data plane must not go on.
pub fn drop_privileges(account: &Account, keeper: Pid) -> Result<()> {
    // Before the user changes: it takes CAP_SETPCAP. Without that capability nothing in the bounding set can be used
    // either, since no_new_privs is set below.
    for capability in CapabilitySet::all() {
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    if rustix::process::geteuid().is_root() {
        rustix::thread::set_thread_groups(&[]).context("dropping supplementary groups")?;
        let gid = account.gid();
        rustix::thread::set_thread_res_gid(gid, gid, gid).context("changing the group")?;
        let uid = account.uid();
        rustix::thread::set_thread_res_uid(uid, uid, uid).context("changing the user")?;
    }
    let _ = rustix::thread::clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )
    .context("dropping capabilities")?;
    rustix::thread::set_no_new_privs(true).context("setting no_new_privs")?;
    // A change of the user clears this, so it comes after.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("tying to the keeper")?;
    if rustix::process::getppid() != Some(keeper) {
        anyhow::bail!("the keeper is gone");
    }
    Ok(())
}

/// Leaves only `state_dir` of all files, no TCP port, and no signal or abstract socket to other processes.
///
/// # Errors
/// The kernel has landlock and refused it. A kernel without it is reported by `Ok(false)`.
pub fn restrict_files(state_dir: &Path) -> Result<bool> {
    let abi = ABI::V6;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new(state_dir)?, AccessFs::from_all(abi)))?
        .restrict_self()
        .context("landlock")?;
    Ok(status.ruleset != landlock::RulesetStatus::NotEnforced)
}

/// System calls of every thread.
const EVERYWHERE: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_ppoll,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// What the control threads need beyond that: clients, netlink, the state directory, and starting threads.
const CONTROL: &[libc::c_long] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getgroups,
    libc::SYS_getpeername,
    libc::SYS_getppid,
    libc::SYS_getrusage,
    libc::SYS_getsockname,
    libc::SYS_getuid,
    libc::SYS_ioctl,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_prlimit64,
    libc::SYS_pwrite64,
    libc::SYS_readlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_sched_setaffinity,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
    libc::SYS_socket,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_umask,
    libc::SYS_uname,
    libc::SYS_unlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
];

/// Leaves this thread and those that it starts the system calls of control threads. All others answer EPERM.
///
/// # Errors
/// The kernel refused the filter.
pub fn restrict_control() -> Result<()> {
    apply(EVERYWHERE.iter().chain(CONTROL))
}

/// Leaves this thread, the health server, what it takes to serve clients on sockets that are given to it: what strangers send is
/// read here, so there is nothing to be opened from it either.
///
/// # Errors
/// The kernel refused the filter.
pub fn restrict_health() -> Result<()> {
    apply(EVERYWHERE.iter().chain(&[libc::SYS_accept4, libc::SYS_shutdown]))
}

/// Leaves this thread, a worker, what a burst needs: no file, no socket, no thread can be opened from it.
///
/// # Errors
/// The kernel refused the filter.
pub fn restrict_worker() -> Result<()> {
    apply(EVERYWHERE.iter())
}

fn apply<'a>(allowed: impl Iterator<Item = &'a libc::c_long>) -> Result<()> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).context("seccomp knows this CPU not")?;
    // EPERM instead of death: a C library that takes another call than those known must not end forwarding. What
    // could do harm (exec, ptrace, mounts, modules, bpf, new namespaces) fails just as surely.
    let refused = SeccompAction::Errno(rustix::io::Errno::PERM.raw_os_error() as u32);
    let rules: BTreeMap<_, _> = allowed.map(|number| (*number, Vec::new())).collect();
    let filter =
        SeccompFilter::new(rules, refused, SeccompAction::Allow, arch).context("making a seccomp filter")?;
    let program: BpfProgram = filter.try_into().context("compiling a seccomp filter")?;
    seccompiler::apply_filter(&program).map_err(io::Error::other).context("installing a seccomp filter")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a thread of its own: what it gives up stays given up.
    #[test]
    fn a_worker_can_open_nothing() {
        let opened = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            restrict_worker().unwrap();
            let file = std::fs::File::open("/etc/passwd").map(drop).map_err(|error| error.kind());
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").map(drop).map_err(|error| error.kind());
            (file, socket)
        });
        let refused = Err(io::ErrorKind::PermissionDenied);
        assert_eq!(opened.join().unwrap(), (refused, refused));
    }

    #[test]
    fn the_health_server_can_accept_and_open_nothing() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let outcome = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            restrict_health().unwrap();
            let accepted = rustix::net::accept_with(&listener, rustix::net::SocketFlags::CLOEXEC).is_ok();
            let file = std::fs::File::open("/etc/passwd").map(drop).map_err(|error| error.kind());
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").map(drop).map_err(|error| error.kind());
            (accepted, file, socket)
        });
        let refused = Err(io::ErrorKind::PermissionDenied);
        assert_eq!(outcome.join().unwrap(), (true, refused, refused));
        drop(client);
    }

    #[test]
    fn a_control_thread_reaches_its_state_directory_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let outcome = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            let enforced = restrict_files(&path).unwrap();
            restrict_control().unwrap();
            let inside = std::fs::write(path.join("objects.tmp"), "x")
                .and_then(|()| std::fs::rename(path.join("objects.tmp"), path.join("objects")));
            let outside = std::fs::File::open("/etc/passwd").map(drop).map_err(|error| error.kind());
            let exec =
                std::process::Command::new("/bin/true").status().map(drop).map_err(|error| error.kind());
            (enforced, inside.is_ok(), outside, exec)
        });
        let (enforced, inside, outside, exec) = outcome.join().unwrap();
        assert!(inside, "the state directory is usable");
        assert_eq!(exec, Err(io::ErrorKind::PermissionDenied));
        if enforced {
            assert_eq!(outside, Err(io::ErrorKind::PermissionDenied));
        } else {
            eprintln!("SKIPPED in part: this kernel has no landlock");
        }
    }
}
