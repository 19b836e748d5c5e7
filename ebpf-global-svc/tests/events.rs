//! Any bytes are an event, or refused.

use std::collections::BTreeSet;

use ebpf_global_svc::abi::{EVENT_KINDS, EventRule, read_event, reason};
use proptest::prelude::*;

#[test]
fn every_reason_has_a_name_of_its_own() {
    let names: Vec<_> = (0..=u8::MAX).filter_map(reason::name).collect();
    assert_eq!(names.len(), 33);
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    assert_eq!(reason::name(reason::POLICY_DENY), Some("policy-deny"));
    assert!(reason::is_drop(reason::INVALID_SOURCE_IP) && !reason::is_drop(reason::POLICY_AUDITED));
}

proptest! {
    #[test]
    fn a_record_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let event = read_event(&bytes);
        prop_assert!(bytes.len() == 128 || event.is_none());
        if let Some(event) = event {
            prop_assert!(u32::from(event.kind) < EVENT_KINDS);
        }
    }

    #[test]
    fn a_record_of_the_right_size_keeps_every_byte(mut bytes in prop::collection::vec(any::<u8>(), 128), kind in 0_u8..5) {
        bytes[118] = kind;
        let event = read_event(&bytes).expect("a kind that there is");
        prop_assert_eq!(event.kind, kind);
        prop_assert_eq!(event.time.to_ne_bytes().to_vec(), &bytes[..8]);
        prop_assert_eq!(event.source.to_vec(), &bytes[16..32]);
        prop_assert_eq!(event.frontend_port.to_ne_bytes().to_vec(), &bytes[116..118]);
        prop_assert_eq!(event.pad, bytes[127]);
    }

    #[test]
    fn a_rule_allows_its_burst(rate in 1_u32.., burst in 0_u32..) {
        let rule = EventRule::new(rate, burst, 1);
        let interval = 1_000_000_000 / u64::from(rate);
        prop_assert_eq!(rule.interval, interval);
        prop_assert_eq!(rule.tolerance, interval * u64::from(burst.max(1) - 1));
    }
}
