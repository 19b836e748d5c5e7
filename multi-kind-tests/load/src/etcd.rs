//! The few things that are asked of an etcd.

use anyhow::Context as _;
use etcd_client::{Client, GetOptions, Txn, TxnOp};

/// etcd's `--max-txn-ops`.
pub(crate) const BATCH: usize = 128;
/// Bytes in one transaction; etcd refuses requests above 1.5 MiB.
const BATCH_BYTES: usize = 512 * 1024;
const PAGE: i64 = 1000;
/// Longer than any reply here.
const REPLY: usize = 256 << 20;

/// Connects to one etcd without TLS.
pub(crate) async fn connect(endpoint: &str) -> anyhow::Result<Client> {
    Client::connect([endpoint], None).await.with_context(|| format!("cannot connect to {endpoint}"))
}

/// Writes in transactions that are as full as they may be, one after the other.
pub(crate) struct Batch<'a> {
    client: &'a mut Client,
    ops: Vec<TxnOp>,
    bytes: usize,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(client: &'a mut Client) -> Self {
        Self { client, ops: Vec::with_capacity(BATCH), bytes: 0 }
    }

    pub(crate) async fn put(&mut self, key: Vec<u8>, value: Vec<u8>) -> anyhow::Result<()> {
        let size = key.len() + value.len();
        if self.ops.len() == BATCH || (self.bytes + size > BATCH_BYTES && !self.ops.is_empty()) {
            self.flush().await?;
        }
        self.bytes += size;
        self.ops.push(TxnOp::put(key, value, None));
        Ok(())
    }

    pub(crate) async fn flush(&mut self) -> anyhow::Result<()> {
        self.bytes = 0;
        if !self.ops.is_empty() {
            self.client.txn(Txn::new().and_then(std::mem::take(&mut self.ops))).await?;
        }
        Ok(())
    }
}

/// Hands all keys under `prefix`, or all there are if it is empty, to `take`, page by page.
pub(crate) async fn list(
    client: &Client,
    prefix: &str,
    mut take: impl AsyncFnMut(Vec<u8>, Vec<u8>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut kv = client.kv_client().max_decoding_message_size(REPLY);
    // etcd's smallest key, and its name for the end of all keys.
    let mut start = if prefix.is_empty() { vec![0] } else { prefix.as_bytes().to_vec() };
    let mut end = start.clone();
    if let Some(last) = end.last_mut().filter(|_| !prefix.is_empty()) {
        *last += 1;
    }
    let mut revision = 0;
    loop {
        let options = GetOptions::new().with_range(end.clone()).with_limit(PAGE).with_revision(revision);
        let mut page = kv.get(start.clone(), Some(options)).await?;
        revision = page.header().map_or(0, |header| header.revision());
        let more = page.more();
        for kv in page.take_kvs() {
            let (key, value) = kv.into_key_value();
            if more {
                start = [&key[..], b"\0"].concat();
            }
            take(key, value).await?;
        }
        if !more {
            return Ok(());
        }
    }
}
