//! The state as bytes: equal states give equal bytes, and bytes that `encode` did not write are refused.

use std::collections::BTreeMap;

use drover_proto::v1::{Removal, StateSnapshot, VmRef};
use prost::Message;

use crate::limits::{
    EVENTS_MAX, HOSTS_MAX, NETWORKS_MAX, REMOVALS_MAX, REQUESTS_MAX, RETIRED_MAX, SNAPSHOT_BYTES_MAX,
    SNAPSHOTS_MAX, VMS_MAX, VOLUMES_MAX,
};
use crate::snapshots::{Removals, snapshot_number};
use crate::state::{Requests, State, migration_number};

/// Why bytes are not a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Larger than any snapshot may be.
    #[error("the snapshot has {0} bytes, more than {SNAPSHOT_BYTES_MAX}")]
    TooLarge(usize),
    /// Not the message.
    #[error("the snapshot is not a StateSnapshot message")]
    Message(#[from] prost::DecodeError),
    /// A list is out of order, holds something twice, or too much.
    #[error("the snapshot's {0} are out of order, repeated, incomplete or too many")]
    List(&'static str),
}

impl State {
    /// The state as a `StateSnapshot` message.
    pub fn encode(&self) -> Vec<u8> {
        let retired = self.retired.iter().map(|(vm, epoch)| VmRef {
            vm: vm.clone(),
            epoch: *epoch,
        });
        let removals = self.removals.iter().map(|((volume, content), pool)| Removal {
            pool: pool.clone(),
            volume: volume.clone(),
            content: *content,
            ..Removal::default()
        });
        let requests = self
            .requests
            .order
            .iter()
            .filter_map(|id| self.requests.by_id.get(id))
            .cloned();
        StateSnapshot {
            cluster_id: self.cluster_id.clone(),
            settings: Some(self.settings),
            hosts: self.hosts.values().cloned().collect(),
            vms: self.vms.values().cloned().collect(),
            migrations: self.migrations.values().cloned().collect(),
            events: self.events.iter().cloned().collect(),
            requests: requests.collect(),
            next_migration: self.next_migration,
            next_event: self.next_event,
            retired: retired.collect(),
            epoch_floor: self.epoch_floor,
            volumes: self.volumes.values().cloned().collect(),
            networks: self.networks.values().cloned().collect(),
            snapshots: self.snapshots.values().cloned().collect(),
            next_snapshot: self.next_snapshot,
            removals: removals.collect(),
        }
        .encode_to_vec()
    }

    /// Reads what [`State::encode`] wrote.
    ///
    /// # Errors
    /// [`DecodeError`] for anything else; nothing is repaired.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() > SNAPSHOT_BYTES_MAX {
            return Err(DecodeError::TooLarge(bytes.len()));
        }
        let snapshot = StateSnapshot::decode(bytes)?;
        let name_of_host = |host: &drover_proto::v1::Host| host.spec.as_ref().map(|spec| spec.name.clone());
        let name_of_vm = |vm: &drover_proto::v1::Vm| {
            vm.placement.as_ref()?;
            vm.spec.as_ref().map(|spec| spec.name.clone())
        };
        let mut requests = Requests::default();
        if snapshot.requests.len() > REQUESTS_MAX {
            return Err(DecodeError::List("requests"));
        }
        for record in snapshot.requests {
            requests.order.push_back(record.request_id.clone());
            if requests.by_id.insert(record.request_id.clone(), record).is_some() {
                return Err(DecodeError::List("requests"));
            }
        }
        let events_rise = snapshot.events.windows(2).all(|pair| pair[0].seq < pair[1].seq);
        let events_end = snapshot
            .events
            .last()
            .is_none_or(|event| event.seq < snapshot.next_event);
        if !events_rise || !events_end || snapshot.events.len() > EVENTS_MAX || snapshot.next_event == 0 {
            return Err(DecodeError::List("events"));
        }
        let migrations = keyed(snapshot.migrations, usize::MAX, "migrations", |m| {
            migration_number(&m.id)
        })?;
        if migrations
            .last_key_value()
            .is_some_and(|(number, _)| *number >= snapshot.next_migration)
        {
            return Err(DecodeError::List("migrations"));
        }
        // One that was written before there were any.
        let next_snapshot = snapshot.next_snapshot.max(1);
        let snapshots = keyed(snapshot.snapshots, SNAPSHOTS_MAX, "snapshots", |snapshot| {
            snapshot.spec.as_ref().and(snapshot_number(&snapshot.id))
        })?;
        if snapshots
            .last_key_value()
            .is_some_and(|(number, _)| *number >= next_snapshot)
        {
            return Err(DecodeError::List("snapshots"));
        }
        let retired = keyed(snapshot.retired, RETIRED_MAX, "retired", |vm| Some(vm.vm.clone()))?;
        Ok(Self {
            cluster_id: snapshot.cluster_id,
            settings: snapshot.settings.ok_or(DecodeError::List("settings"))?,
            hosts: keyed(snapshot.hosts, HOSTS_MAX, "hosts", name_of_host)?,
            vms: keyed(snapshot.vms, VMS_MAX, "vms", name_of_vm)?,
            volumes: keyed(snapshot.volumes, VOLUMES_MAX, "volumes", |volume| {
                Some(volume.name.clone())
            })?,
            networks: keyed(snapshot.networks, NETWORKS_MAX, "networks", |network| {
                Some(network.name.clone())
            })?,
            snapshots,
            removals: removals_of(snapshot.removals)?,
            next_snapshot,
            migrations,
            events: snapshot.events.into(),
            requests,
            retired: retired.into_iter().map(|(name, vm)| (name, vm.epoch)).collect(),
            epoch_floor: snapshot.epoch_floor,
            next_migration: snapshot.next_migration,
            next_event: snapshot.next_event,
        })
    }
}

fn removals_of(list: Vec<Removal>) -> Result<Removals, DecodeError> {
    let key = |removal: &Removal| {
        let of_volume = removal.snapshot.is_empty();
        of_volume.then(|| (removal.volume.clone(), removal.content))
    };
    let removals = keyed(list, REMOVALS_MAX, "removals", key)?;
    Ok(removals
        .into_iter()
        .map(|(key, removal)| (key, removal.pool))
        .collect())
}

/// A list that must be strictly rising by its key, as a map.
fn keyed<K: Ord, V>(
    list: Vec<V>,
    max: usize,
    what: &'static str,
    key: impl Fn(&V) -> Option<K>,
) -> Result<BTreeMap<K, V>, DecodeError> {
    if list.len() > max {
        return Err(DecodeError::List(what));
    }
    let mut map = BTreeMap::new();
    for value in list {
        let key = key(&value).ok_or(DecodeError::List(what))?;
        if map.last_key_value().is_some_and(|(last, _)| *last >= key) {
            return Err(DecodeError::List(what));
        }
        map.insert(key, value);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use drover_proto::v1::Vm;

    use super::*;

    #[test]
    fn an_empty_state_survives_the_bytes() {
        let state = State::default();
        assert_eq!(State::decode(&state.encode()).unwrap(), state);
    }

    #[test]
    fn a_snapshot_that_was_not_written_by_encode_is_refused() {
        assert!(matches!(
            State::decode(b"\xff\xff\xff"),
            Err(DecodeError::Message(_))
        ));
        assert!(matches!(State::decode(b""), Err(DecodeError::List("events"))));
        let broken = StateSnapshot {
            settings: Some(crate::default_settings()),
            next_event: 1,
            next_migration: 1,
            vms: vec![Vm::default()],
            ..StateSnapshot::default()
        };
        assert!(matches!(
            State::decode(&broken.encode_to_vec()),
            Err(DecodeError::List("vms"))
        ));
    }
}
