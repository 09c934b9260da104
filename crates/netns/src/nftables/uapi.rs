//! The numbers of `linux/netfilter/nf_tables.h` and, where it says so, of nft's own data types, which the kernel only
//! carries so that `nft list` shows what was meant.

/// Messages: `NFNL_SUBSYS_NFTABLES` in the high byte.
pub(crate) const SUBSYSTEM: u16 = 10;
pub(crate) const BATCH_BEGIN: u16 = 0x10;
pub(crate) const BATCH_END: u16 = 0x11;

pub(crate) const NEW_TABLE: u16 = 0;
pub(crate) const GET_TABLE: u16 = 1;
pub(crate) const DELETE_TABLE: u16 = 2;
pub(crate) const NEW_CHAIN: u16 = 3;
pub(crate) const GET_CHAIN: u16 = 4;
pub(crate) const DELETE_CHAIN: u16 = 5;
pub(crate) const NEW_RULE: u16 = 6;
pub(crate) const GET_RULE: u16 = 7;
pub(crate) const DELETE_RULE: u16 = 8;
pub(crate) const NEW_SET: u16 = 9;
pub(crate) const GET_SET: u16 = 10;
pub(crate) const DELETE_SET: u16 = 11;
pub(crate) const NEW_ELEMENTS: u16 = 12;
pub(crate) const GET_ELEMENTS: u16 = 13;
pub(crate) const DELETE_ELEMENTS: u16 = 14;
pub(crate) const GET_GENERATION: u16 = 16;
pub(crate) const NEW_OBJECT: u16 = 18;
pub(crate) const GET_OBJECT: u16 = 19;
pub(crate) const DELETE_OBJECT: u16 = 20;

/// In every kind of message but those of elements, objects and generations: the table, and the name within it.
pub(crate) const TABLE: u16 = 1;

pub(crate) mod table {
    pub(crate) const NAME: u16 = 1;
}

pub(crate) mod chain {
    pub(crate) const HANDLE: u16 = 2;
    pub(crate) const NAME: u16 = 3;
    pub(crate) const HOOK: u16 = 4;
    pub(crate) const POLICY: u16 = 5;
    pub(crate) const USE: u16 = 6;
    pub(crate) const TYPE: u16 = 7;
    pub(crate) const COUNTERS: u16 = 8;

    pub(crate) const HOOK_NUMBER: u16 = 1;
    pub(crate) const HOOK_PRIORITY: u16 = 2;
    pub(crate) const HOOK_DEVICE: u16 = 3;
}

pub(crate) mod rule {
    pub(crate) const CHAIN: u16 = 2;
    pub(crate) const HANDLE: u16 = 3;
    pub(crate) const EXPRESSIONS: u16 = 4;
    pub(crate) const POSITION: u16 = 6;
    pub(crate) const USER_DATA: u16 = 7;
}

pub(crate) mod set {
    pub(crate) const NAME: u16 = 2;
    pub(crate) const FLAGS: u16 = 3;
    pub(crate) const KEY_TYPE: u16 = 4;
    pub(crate) const KEY_LENGTH: u16 = 5;
    pub(crate) const DATA_TYPE: u16 = 6;
    pub(crate) const DATA_LENGTH: u16 = 7;
    pub(crate) const DESCRIPTION: u16 = 9;
    pub(crate) const ID: u16 = 10;
    pub(crate) const USER_DATA: u16 = 13;
    pub(crate) const HANDLE: u16 = 16;

    pub(crate) const DESCRIPTION_SIZE: u16 = 1;

    pub(crate) const ANONYMOUS: u32 = 1;
    pub(crate) const CONSTANT: u32 = 2;
    pub(crate) const MAP: u32 = 8;

    /// `NFT_DATA_VERDICT`: the type of a map's data that are verdicts.
    pub(crate) const VERDICT: u32 = 0xffff_ff00;
}

pub(crate) mod elements {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const SET: u16 = 2;
    pub(crate) const LIST: u16 = 3;
    pub(crate) const SET_ID: u16 = 4;

    pub(crate) const KEY: u16 = 1;
    pub(crate) const DATA: u16 = 2;
}

pub(crate) mod object {
    pub(crate) const NAME: u16 = 2;
    pub(crate) const TYPE: u16 = 3;
    pub(crate) const DATA: u16 = 4;
    pub(crate) const USE: u16 = 5;
    pub(crate) const HANDLE: u16 = 6;

    /// `NFT_OBJECT_CT_TIMEOUT`.
    pub(crate) const CT_TIMEOUT: u32 = 7;
    pub(crate) const TIMEOUT_L3PROTO: u16 = 1;
    pub(crate) const TIMEOUT_L4PROTO: u16 = 2;
    pub(crate) const TIMEOUT_DATA: u16 = 3;
}

pub(crate) mod expression {
    /// In a list: `NFTA_LIST_ELEM`.
    pub(crate) const ELEMENT: u16 = 1;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DATA: u16 = 2;

    pub(crate) const VALUE: u16 = 1;
    pub(crate) const VERDICT: u16 = 2;
    pub(crate) const VERDICT_CODE: u16 = 1;
    pub(crate) const VERDICT_CHAIN: u16 = 2;
}

/// The first attribute of `NEW_GENERATION`.
pub(crate) const GENERATION_ID: u16 = 1;
