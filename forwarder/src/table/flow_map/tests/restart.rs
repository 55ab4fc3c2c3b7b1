//! A region is opened again: after a clean end, after damage, after `kill -9` at any instruction.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::layout::{Life, Slot};
use super::*;

fn open(file: &File, capacity: u32) -> (FlowMap, Recovery) {
    FlowMap::open(file, config(capacity)).unwrap()
}

#[test]
fn flows_go_on() {
    let file = tempfile::tempfile().unwrap();
    let (map, recovery) = open(&file, 1_000);
    assert_eq!(recovery, Recovery { empty: Some(EmptyReason::New), ..Recovery::default() });
    let mut worker = map.worker(0);
    let (mut ids, hash) = (Vec::new(), map.hash(&client(1)));
    for i in 0..300 {
        let new = NewFlow { phase: (i % 2) as u8, ..if i % 3 == 0 { flow_v6(i) } else { flow(i) } };
        ids.push((new.original, map.insert(&mut worker, &new, i).unwrap().flow.id()));
    }
    map.remove(&mut worker, ids.pop().unwrap().1);
    find(&map, &client(1)).unwrap().flow.set_flags(0x8001);
    let before: Vec<_> = (0..1_000).filter_map(|i| map.snapshot(i)).collect();
    assert!(map.remove_from_control(ids[0].1));
    // Not even dropped: what a killed process leaves.
    std::mem::forget(worker);
    std::mem::forget(map);

    let (map, recovery) = open(&file, 1_000);
    assert_eq!(recovery, Recovery { kept: 298, scrubbed: 1, cleared_slots: 2, ..Recovery::default() });
    assert_eq!(map.hash(&client(1)), hash);
    for (tuple, id) in &ids[1..] {
        assert_eq!(find(&map, tuple).unwrap().flow.id(), *id);
    }
    let after: Vec<_> = (0..1_000).filter_map(|i| map.snapshot(i)).collect();
    assert_eq!(before[1..], after);
    assert_eq!(find(&map, &client(1)).unwrap().flow.flags(), 0x8001);
    assert_consistent(&map);
    // Every other record can be used.
    let mut worker = map.worker(0);
    for i in 1_000..1_702 {
        map.insert(&mut worker, &flow(i), 1).unwrap();
    }
    assert_eq!(map.insert(&mut worker, &flow(2_000), 1).unwrap_err(), InsertError::Full);
}

/// Tallies mean something to one process only.
#[test]
fn tallies_begin_anew() {
    let file = tempfile::tempfile().unwrap();
    let config = FlowMapConfig { tallies: 8, ..config(100) };
    let (map, _) = FlowMap::open(&file, config).unwrap();
    let mut worker = map.worker(0);
    let ids =
        [3, 5].map(|tally| map.insert(&mut worker, &NewFlow { tally, ..flow(tally) }, 1).unwrap().flow.id());
    drop((worker, map));
    let (map, recovery) = FlowMap::open(&file, config).unwrap();
    assert_eq!((recovery.kept, map.tally(3), map.tally(5)), (2, 0, 0));
    map.assign_tally(ids[0], 5);
    let mut worker = map.worker(0);
    assert_eq!(map.tally(5), 1);
    ids.into_iter().for_each(|id| map.remove(&mut worker, id));
    assert_eq!((map.tally(3), map.tally(5)), (0, 0));
}

#[test]
fn what_cannot_be_kept_is_said() {
    let file = tempfile::tempfile().unwrap();
    let refill = |capacity| {
        let (map, recovery) = open(&file, capacity);
        let mut worker = map.worker(0);
        assert!(map.insert(&mut worker, &flow(1), 1).unwrap().is_new || recovery.kept == 1);
        recovery.empty
    };
    assert_eq!(refill(100), Some(EmptyReason::New));
    assert_eq!(refill(100), None);
    let other = FlowMap::open(&file, config(200)).unwrap_err();
    assert!(matches!(other, FlowMapError::Capacity { found: 100, expected: 200 }), "{other}");
    file.set_len(0).unwrap();
    assert_eq!(refill(200), Some(EmptyReason::New));
    assert_eq!(refill(200), None);
    file.write_at(b"x", 3).unwrap();
    assert_eq!(refill(200), Some(EmptyReason::Foreign));
    file.write_at(&[9], 8).unwrap();
    assert_eq!(refill(200), Some(EmptyReason::LayoutVersion { found: 9, expected: 2 }));
    file.write_at(&[1, 2, 3], 34).unwrap();
    assert_eq!(refill(200), Some(EmptyReason::Checksum));
    let len = file.metadata().unwrap().len();
    file.set_len(len - 1).unwrap();
    assert_eq!(refill(200), Some(EmptyReason::Length { found: len - 1, expected: len }));
    file.set_len(100).unwrap();
    assert_eq!(refill(200), Some(EmptyReason::Length { found: 100, expected: 4_096 }));
    (&file).write_all(&[7; 8192]).unwrap();
    assert_eq!(refill(200), Some(EmptyReason::Foreign));
    assert_eq!(refill(200), None);
}

#[test]
fn flows_are_copied_to_a_region_of_another_capacity() {
    let file = tempfile::tempfile().unwrap();
    let copy = |from: &File, capacity| {
        let to = tempfile::tempfile().unwrap();
        let recovery = FlowMap::copy(from, &to, config(capacity)).unwrap();
        assert_eq!(FlowMap::capacity_of(&to), Some(capacity));
        (open(&to, capacity).0, to, recovery)
    };
    let (map, _) = open(&file, 1_000);
    let mut worker = map.worker(0);
    for i in 0..200 {
        let new =
            NewFlow { phase: (i % 4 != 0).into(), flags: 9, ..if i % 3 == 0 { flow_v6(i) } else { flow(i) } };
        map.insert(&mut worker, &new, i).unwrap().flow.touch(i + 5);
    }
    let affinity = NewFlow {
        original: client(777),
        endpoint_addr: Addr::v4(5),
        timeout_s: 99,
        phase: 1,
        ..NewFlow::default()
    };
    let affinity = NewFlow { service: signature(&affinity.original, None, 0), ..affinity };
    map.insert(&mut worker, &affinity, 1).unwrap();
    let flows = |map: &FlowMap| {
        let mut flows: Vec<_> = (0..map.capacity() as u32).filter_map(|i| map.snapshot(i)).collect();
        flows.sort_by_key(|flow| flow.original.to_string());
        flows
    };
    let before = flows(&map);
    drop((worker, map));

    let (map, larger, recovery) = copy(&file, 2_500);
    assert_eq!(recovery, Recovery { kept: 201, ..Recovery::default() });
    assert_consistent(&map);
    let after = flows(&map);
    assert_eq!(after.len(), before.len());
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(*before, FlowSnapshot { id: before.id, ..*after });
    }
    assert_eq!(find(&map, &client(777)).unwrap().flow.timeout_s(), 99);
    drop(map);

    // Less room: established flows go first.
    let (map, _, recovery) = copy(&larger, 160);
    assert_eq!((recovery.kept, recovery.left_out), (160, 41));
    assert_eq!(map.embryonic_len(), 9);
    assert_consistent(&map);
    // What was copied from is as it was.
    assert_eq!(open(&larger, 2_500).1.kept, 201);
    assert_eq!(open(&file, 1_000).1.kept, 201);
}

/// Each point at which a process may die while it publishes or removes, and worse.
#[test]
fn every_half_done_step_is_repaired() {
    let file = tempfile::tempfile().unwrap();
    let (map, _) = open(&file, 100);
    let mut worker = map.worker(0);
    let mut ids: Vec<FlowId> = Vec::new();
    for i in 0..10 {
        ids.push(map.insert(&mut worker, &flow(i), 1).unwrap().flow.id());
    }
    let record = |i: usize| &map.region.records()[ids[i].index() as usize];
    let set_life = |i: usize, life| {
        let state = record(i).state(Ordering::Relaxed).with_life(life);
        record(i).state.store(state.0, Ordering::Relaxed);
    };
    let hash = |i: u32, direction| {
        map.hash(&if direction == Direction::Original { client(i) } else { flow(i).reply.unwrap() })
    };
    let clear = |i: u32, direction| map.unplace(hash(i, direction), direction, ids[i as usize].index());
    // Insert: written, nothing linked; reply linked; both linked, not live yet.
    set_life(0, Life::Pending);
    clear(0, Direction::Original);
    clear(0, Direction::Reply);
    set_life(1, Life::Pending);
    clear(1, Direction::Original);
    set_life(2, Life::Pending);
    // Removal: dead with both slots; with one; condemned.
    set_life(3, Life::Dead);
    set_life(4, Life::Dead);
    clear(4, Direction::Original);
    set_life(5, Life::Condemned);
    // Damage: slots missing, doubled, leading nowhere, wrong tag.
    clear(6, Direction::Original);
    clear(7, Direction::Original);
    clear(7, Direction::Reply);
    let double = Slot::new(hash(8, Direction::Reply), Direction::Reply, false, ids[8].index());
    map.place(hash(8, Direction::Reply), double).unwrap();
    map.place(0, Slot::new(0, Direction::Original, false, 5_000_000)).unwrap();
    map.place(0, Slot::new(0, Direction::Original, false, 99)).unwrap();
    drop(worker);
    drop(map);

    let (map, recovery) = open(&file, 100);
    let expected = Recovery { kept: 4, scrubbed: 4, relinked: 3, ..Recovery::default() };
    assert_eq!(Recovery { cleared_slots: 0, ..recovery }, expected);
    // One of 1, two each of 2, 3 and 5, one of 4, and the three that damage added.
    assert_eq!(recovery.cleared_slots, 11);
    for i in 0..10 {
        assert_eq!(find(&map, &client(i)).is_some(), i >= 6, "flow {i}");
    }
    assert_consistent(&map);
}

const REGION_ENV: &str = "TOWPATH_TEST_FLOW_REGION";
const PERMANENT: u32 = 1 << 24;

/// The child: two threads that insert, remove and age until they are killed. Every eighth flow of a thread is never removed, and its
/// number is written to the progress file after it is in.
fn write_until_killed(path: &str) -> ! {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let progress = File::options().read(true).write(true).open(format!("{path}.progress")).unwrap();
    let progress = memmap2::MmapRaw::map_raw(&progress).unwrap();
    // SAFETY: the file has two words, the mapping starts at a page and lives until the process is killed; only atomics touch it.
    let progress = unsafe { std::slice::from_raw_parts(progress.as_ptr().cast::<AtomicU64>(), 2) };
    let (map, _) = FlowMap::open(&file, restart_config()).unwrap();
    std::thread::scope(|scope| {
        for index in 0..2 {
            let (map, progress) = (&map, &progress[index]);
            scope.spawn(move || {
                let mut worker = map.worker(index);
                let mut kept = progress.load(Ordering::Relaxed);
                let mut round = 0;
                loop {
                    round += 1;
                    // Both threads share the passing flows, so that they meet.
                    let passing = if round % 3 == 0 { flow_v6(round % 50) } else { flow(round % 50) };
                    let inserted = map.insert(&mut worker, &NewFlow { phase: 2, ..passing }, round / 64);
                    if let (Ok(inserted), 0) = (inserted, round % 2) {
                        map.remove(&mut worker, inserted.flow.id());
                    }
                    if round % 8 == 0 && kept < 8_000 {
                        let number = PERMANENT * (index as u32 + 1) + kept as u32;
                        map.insert(&mut worker, &flow(number), 1).unwrap();
                        kept += 1;
                        progress.store(kept, Ordering::Release);
                    }
                    map.age(&mut worker, round / 64, 16);
                    map.quiescent(&mut worker);
                }
            });
        }
    });
    unreachable!("the threads never end");
}

fn restart_config() -> FlowMapConfig {
    let mut timeouts_s = [1 << 30; 16];
    timeouts_s[2] = 1;
    FlowMapConfig { workers: 2, timeouts_s, ..config(20_000) }
}

#[test]
fn a_killed_process_loses_no_published_flow() {
    const KILLS: u64 = 100;
    if let Ok(path) = std::env::var(REGION_ENV) {
        write_until_killed(&path);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows");
    let file = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
    let progress = File::create(dir.path().join("flows.progress")).unwrap();
    progress.set_len(16).unwrap();
    let progress = File::open(dir.path().join("flows.progress")).unwrap();
    let mut scrubbed = 0;
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "table::flow_map::tests::restart::a_killed_process_loses_no_published_flow"])
            .args(["--nocapture", "--test-threads=1"])
            .env(REGION_ENV, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(8_000 + kill * 7_919 % 20_000));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9),
            "the writer ended by itself"
        );

        let (map, recovery) = FlowMap::open(&file, restart_config()).unwrap();
        assert_eq!(recovery.relinked, 0);
        assert!(recovery.empty.is_none() || kill == 0, "{recovery:?}");
        assert_consistent(&map);
        scrubbed += recovery.scrubbed;
        let mut words = [0u8; 16];
        progress.read_exact_at(&mut words, 0).unwrap();
        for (thread, kept) in words.as_chunks::<8>().0.iter().enumerate() {
            for number in 0..u64::from_ne_bytes(*kept) {
                let tuple = client(PERMANENT * (thread as u32 + 1) + number as u32);
                assert!(find(&map, &tuple).is_some(), "kill {kill}: {tuple} was published and is gone");
            }
        }
    }
    let mut words = [0u8; 16];
    progress.read_exact_at(&mut words, 0).unwrap();
    let kept: u64 = words.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).sum();
    println!("{KILLS} kills, {kept} permanent flows kept, {scrubbed} half-made flows scrubbed");
    assert!(kept > 100, "the writers got nowhere");
}
