"""Owns the layouts of the Identify data structures (NVM Express Base 1.3, 5.15.2). Every one is 4096 bytes
long.
"""

from __future__ import annotations

from enum import IntEnum

from construct import Array, Bytes, BytesInteger, Int8ul, Int16ul, Int32ul, Int64ul, Padded, Padding, Struct

IDENTIFY_BYTES = 4096
LIGHTNVM_MARK_OFFSET = 384      # Linux binds lightnvm when this vendor byte of Identify Namespace is 1
LBA_FORMATS = 16


class Cns(IntEnum):
    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    DESCRIPTORS = 0x03
    NAMESPACE_CSI = 0x05
    CONTROLLER_CSI = 0x06
    ACTIVE_NAMESPACES_CSI = 0x07
    NAMESPACE_INDEPENDENT = 0x08
    ALLOCATED_NAMESPACES = 0x10
    ALLOCATED_NAMESPACE = 0x11


Int128ul = BytesInteger(16, swapped=True)

PowerState = Struct("mp" / Int16ul, Padding(2), "enlat" / Int32ul, "exlat" / Int32ul, Padding(20))

IdentifyController = Padded(IDENTIFY_BYTES, Struct(
    "vid" / Int16ul, "ssvid" / Int16ul, "sn" / Bytes(20), "mn" / Bytes(40), "fr" / Bytes(8),
    "rab" / Int8ul, "ieee" / Bytes(3), "cmic" / Int8ul, "mdts" / Int8ul, "cntlid" / Int16ul, "ver" / Int32ul,
    "rtd3r" / Int32ul, "rtd3e" / Int32ul, "oaes" / Int32ul, "ctratt" / Int32ul, Padding(11),
    "cntrltype" / Int8ul,
    Padding(144),
    # 256: admin command set
    "oacs" / Int16ul, "acl" / Int8ul, "aerl" / Int8ul, "frmw" / Int8ul, "lpa" / Int8ul, "elpe" / Int8ul,
    "npss" / Int8ul, "avscc" / Int8ul, "apsta" / Int8ul, "wctemp" / Int16ul, "cctemp" / Int16ul,
    "mtfa" / Int16ul,
    "hmpre" / Int32ul, "hmmin" / Int32ul, "tnvmcap" / Int128ul, "unvmcap" / Int128ul, "rpmbs" / Int32ul,
    "edstt" / Int16ul, "dsto" / Int8ul, "fwug" / Int8ul, "kas" / Int16ul, "hctma" / Int16ul,
    "mntmt" / Int16ul,
    "mxtmt" / Int16ul, "sanicap" / Int32ul, Padding(180),
    # 512: NVM command set
    "sqes" / Int8ul, "cqes" / Int8ul, "maxcmd" / Int16ul, "nn" / Int32ul, "oncs" / Int16ul, "fuses" / Int16ul,
    "fna" / Int8ul, "vwc" / Int8ul, "awun" / Int16ul, "awupf" / Int16ul, "nvscc" / Int8ul, "nwpc" / Int8ul,
    "acwu" / Int16ul, Padding(2), "sgls" / Int32ul, Padding(228),
    # 768
    "subnqn" / Bytes(256), Padding(1024),
    # 2048
    "psd" / Array(32, PowerState),
))

LbaFormat = Struct("ms" / Int16ul, "lbads" / Int8ul, "rp" / Int8ul)

IdentifyNamespace = Padded(IDENTIFY_BYTES, Struct(
    "nsze" / Int64ul, "ncap" / Int64ul, "nuse" / Int64ul, "nsfeat" / Int8ul, "nlbaf" / Int8ul,
    "flbas" / Int8ul,
    "mc" / Int8ul, "dpc" / Int8ul, "dps" / Int8ul, "nmic" / Int8ul, "rescap" / Int8ul, "fpi" / Int8ul,
    "dlfeat" / Int8ul, "nawun" / Int16ul, "nawupf" / Int16ul, "nacwu" / Int16ul, "nabsn" / Int16ul,
    "nabo" / Int16ul, "nabspf" / Int16ul, "noiob" / Int16ul, "nvmcap" / Int128ul, "npwg" / Int16ul,
    "npwa" / Int16ul, "npdg" / Int16ul, "npda" / Int16ul, "nows" / Int16ul, Padding(30),
    "nguid" / Bytes(16), "eui64" / Bytes(8),
    "lbaf" / Array(LBA_FORMATS, LbaFormat), Padding(192),
    "vs0" / Int8ul,
))

NamespaceList = Array(IDENTIFY_BYTES // 4, Int32ul)

# Namespace identification descriptors: type 1 EUI-64, 2 NGUID, 3 UUID, 4 CSI.
NamespaceDescriptor = Struct("nidt" / Int8ul, "nidl" / Int8ul, Padding(2))


class DescriptorType(IntEnum):
    EUI64 = 1
    NGUID = 2
    UUID = 3
    CSI = 4


NamespaceIndependent = Padded(IDENTIFY_BYTES, Struct(
    "nsfeat" / Int8ul, "nmic" / Int8ul, "rescap" / Int8ul, "fpi" / Int8ul, "anagrpid" / Int32ul,
    "nsattr" / Int8ul, Padding(1), "nvmsetid" / Int16ul, "endgid" / Int16ul, "nstat" / Int8ul,
))
