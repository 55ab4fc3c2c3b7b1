//! Kubernetes' own network tests as scenarios of ours, on real sockets between namespaces; see docs/kubernetes-e2e.md.
//!
//! ```text
//! cargo test -p tests --test e2e                       all of them, and the table must be up to date
//! cargo test -p tests --test e2e session affinity      those whose upstream name, or whose own, has all the words
//! cargo test -p tests --test e2e -- --table            all of them, and write the table
//! cargo test -p tests --test e2e -- --list
//! ```
//!
//! One rig serves all scenarios, one after the other; so this is not the standard harness, though it prints as that does.

mod rig;

mod scenario;
mod table;
mod test;

mod conntrack;
mod dual_stack;
mod granular;
mod load_balancers;
mod services;
mod topology;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use rig::{Gateway, Rig};
use scenario::{Group, Ours};
use test::Test;

/// Every group, in the order of the table.
fn groups() -> Vec<&'static Group> {
    let files = [
        services::GROUPS,
        conntrack::GROUPS,
        load_balancers::GROUPS,
        granular::GROUPS,
        topology::GROUPS,
        dual_stack::GROUPS,
    ];
    files.into_iter().flatten().collect()
}

/// A scenario that is to run.
struct Job {
    group: &'static str,
    upstream: &'static str,
    name: &'static str,
    gateway: Gateway,
    body: fn(&mut Test) -> Result<()>,
}

fn main() -> ExitCode {
    let (mut words, mut write_table, mut list) = (Vec::new(), false, false);
    for arg in std::env::args().skip(1) {
        match arg.as_str() {
            "--table" => write_table = true,
            "--list" => list = true,
            // Of the standard harness; scenarios run one after the other and show what they print.
            "--nocapture" | "--show-output" => {}
            _ if arg.starts_with("--test-threads") => {}
            _ if arg.starts_with('-') => {
                eprintln!("e2e: unknown option {arg}; there are --table and --list");
                return ExitCode::from(2);
            }
            _ => words.extend(arg.split_whitespace().map(str::to_lowercase)),
        }
    }
    let groups = groups();
    let mut jobs: Vec<Job> = groups.iter().copied().flat_map(jobs_of).collect();
    let all = jobs.len();
    jobs.retain(|job| {
        let names = format!("{} {} {}", job.group, job.upstream, job.name).to_lowercase();
        words.iter().all(|word| names.contains(word))
    });
    if list {
        jobs.iter().for_each(|job| println!("{} {}: test", job.group, job.upstream));
        return ExitCode::SUCCESS;
    }
    // A gateway is set up anew only once for each kind.
    jobs.sort_by_key(|job| job.gateway);
    let begin = Instant::now();
    println!("\nrunning {} scenarios", jobs.len());
    let mut passed: Vec<(&str, &str)> = Vec::new();
    let mut failures = run_all(&jobs, &mut passed);
    if jobs.len() == all && failures.iter().all(|failure| !failure.starts_with(RIG)) {
        let text = table::render(&groups, &|group, upstream| Some(passed.contains(&(group.name, upstream))));
        let outcome = if write_table { table::write(&text) } else { table::compare(&text) };
        failures.extend(outcome.err().map(|error| format!("the table: {error:#}")));
    }
    let verdict = if failures.is_empty() { "ok" } else { "FAILED" };
    if !failures.is_empty() {
        println!("\nfailures:\n    {}", failures.join("\n    "));
    }
    println!(
        "\ntest result: {verdict}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        passed.len(),
        failures.len(),
        all - jobs.len(),
        begin.elapsed().as_secs_f64()
    );
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(101) }
}

/// What failures of the rig itself begin with.
const RIG: &str = "the rig";

fn jobs_of(group: &'static Group) -> impl Iterator<Item = Job> {
    group.scenarios.iter().filter_map(move |scenario| match &scenario.ours {
        Ours::Runs { name, gateway, body } => {
            let upstream = scenario.upstream;
            Some(Job { group: group.name, upstream, name, gateway: *gateway, body: *body })
        }
        Ours::NotApplicable(_) => None,
    })
}

/// Runs them and returns what failed, a line each.
fn run_all(jobs: &[Job], passed: &mut Vec<(&'static str, &'static str)>) -> Vec<String> {
    let mut failures = Vec::new();
    if jobs.is_empty() {
        return failures;
    }
    let mut rig = match Rig::new() {
        Ok(rig) => rig,
        Err(error) => return vec![format!("{RIG}: {error:#}")],
    };
    for job in jobs {
        let start = Instant::now();
        let outcome = run(&mut rig, job);
        let took = start.elapsed().as_secs_f64();
        let name = format!("{} {}", job.group, job.upstream);
        match outcome {
            Ok(()) => {
                println!("test {name} ... ok ({took:.2}s)");
                passed.push((job.group, job.upstream));
            }
            Err(error) => {
                println!("test {name} ... FAILED ({took:.2}s)\n    {error:#}\n{}", rig.evidence());
                failures.push(format!("{name}: {error:#}"));
                // Nothing of it may touch the next one.
                rig.stop();
            }
        }
    }
    failures.extend(rig.finish().err().map(|error| format!("{RIG}, at the end: {error:#}")));
    failures
}

fn run(rig: &mut Rig, job: &Job) -> Result<()> {
    let cluster = rig.begin(job.gateway).context("beginning")?;
    let mut test = Test::new(rig, cluster);
    let outcome = catch_unwind(AssertUnwindSafe(|| (job.body)(&mut test)))
        .unwrap_or_else(|_| Err(anyhow!("panicked, see above")));
    let after = test.finish().context("after the scenario");
    outcome.and(after)
}
