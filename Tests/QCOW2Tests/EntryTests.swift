import QCOW2
import TestSupport
import Testing

/// What the bits of table entries mean, one by one.
@Suite("Entries of tables")
struct EntryTests {
    static let mask: UInt64 = 0xffff
    static let copied: UInt64 = 1 << 63

    @Test("An L1 entry is an offset and COPIED; all else is reserved")
    func l1() {
        for (bits, offset, isCopied, reserved) in [
            (0, 0, false, 0), (Self.copied | 0x30000, 0x30000, true, 0),
            (1 << 55 | 512, 1 << 55 | 512, false, 0), (1 << 56, 0, false, 1 << 56),
            (Self.copied | 256, 0, true, 256), (1 << 62 | 1, 0, false, 1 << 62 | 1),
        ] as [(UInt64, UInt64, Bool, UInt64)] {
            let entry = L1Entry(bits: bits)
            #expect(entry.offset == offset && entry.isCopied == isCopied, "\(bits)")
            #expect(entry.reservedBits == reserved, "\(bits)")
            #expect(entry.isCopiedAndKnown == (isCopied && reserved == 0), "\(bits)")
            #expect(entry.withoutCopied.bits == bits & ~Self.copied)
        }
        #expect(L1Entry(copiedTableAt: 0x30000).bits == Self.copied | 0x30000)
    }

    @Test("An L2 entry is an offset with three flags; all else is reserved")
    func l2() {
        for (bits, offset, reserved) in [
            (Self.copied | 0x30001, 0x30000, 0), (1 << 55 | 512, 1 << 55 | 512, 0),
            (1 << 56 | 2, 0, 1 << 56 | 2), (1 << 61 | 256, 0, 1 << 61 | 256),
            (1 << 62 | 1 << 61 | 2, 0, 0),
        ] as [(UInt64, UInt64, UInt64)] {
            let entry = L2Entry(bits: bits)
            #expect(entry.offset == offset && entry.reservedBits == reserved, "\(bits)")
            #expect(entry.isCopied == (bits >> 63 == 1))
            #expect(entry.isCompressed == (bits >> 62 & 1 == 1))
            #expect(entry.hasZeroFlag == (bits & 1 == 1))
            #expect(entry.withCopied(true).bits == bits | Self.copied)
            #expect(entry.withoutCopied.bits == bits & ~Self.copied)
            #expect(entry.withZeroFlag.bits == bits | 1)
        }
        #expect(L2Entry(copiedClusterAt: 0x30000).isCopiedAndKnown)
        for bits in [0x30000, Self.copied | 0x30002, Self.copied | 1 << 57] {
            #expect(!L2Entry(bits: bits).isCopiedAndKnown, "\(bits)")
        }
        for (bits, shows) in [
            (0, false), (1, false), (0x30000, true), (0x30001, false), (Self.copied, true),
            (Self.copied | 1, false), (1 << 62, true), (1 << 62 | 1, true), (2, false),
        ] as [(UInt64, Bool)] {
            #expect(L2Entry(bits: bits).showsData == shows, "\(bits)")
        }
    }

    @Test("What a standard entry means")
    func kinds() {
        for (bits, version, kind) in [
            (0, 3, .unallocated), (0x30000, 3, .data), (1, 3, .zeroPlain), (1, 2, .corrupt),
            (0x30001, 3, .zeroAllocated), (0x30001, 2, .corrupt), (0x30000, 2, .data),
            (0x30200, 3, .corrupt), (1 << 62 | 5, 3, .compressed), (3 << 62 | 5, 3, .corrupt),
            (Self.copied, 3, .unallocated), (1 << 62 | 0x30200, 2, .compressed),
        ] as [(UInt64, UInt32, ClusterKind)] {
            let found = L2Entry(bits: bits).kind(clusterMask: Self.mask, version: version)
            #expect(found == kind, "\(bits)")
        }
    }

    @Test("With a data file each cluster has its own place, and COPIED tells the first from none")
    func dataFile() {
        for (bits, guest, kind) in [
            (0, 0, .unallocated), (Self.copied, 0, .data), (1, 0, .zeroPlain),
            (Self.copied | 1, 0, .zeroPlain), (0, 0x30000, .unallocated),
            (Self.copied | 0x30000, 0x30000, .data), (0x30000, 0x30000, .data),
            (Self.copied | 0x30001, 0x30000, .zeroAllocated), (0x30000, 0, .corrupt),
            (0x30000, 0x40000, .corrupt), (Self.copied, 0x30000, .corrupt),
            (1 << 62, 0, .corrupt), (1, 0x30000, .zeroPlain),
        ] as [(UInt64, UInt64, ClusterKind)] {
            #expect(L2Entry(bits: bits).kindWithDataFile(at: guest) == kind, "\(bits) at \(guest)")
        }
    }

    @Test("Each fault has its own words")
    func faults() {
        func words(
            _ bits: UInt64, _ subclusters: UInt64 = 0, version: UInt32 = 3, isExtended: Bool = false
        ) -> String {
            L2Entry(bits: bits, subclusters: SubclusterBitmap(bits: subclusters)).fault(
                clusterByteCount: 65536, version: version, isExtended: isExtended)
        }
        #expect(words(3 << 62).contains("compressed and marked COPIED"))
        #expect(words(1 << 62, 1).contains("compressed and has a subcluster bitmap"))
        #expect(words(512).contains("points inside a cluster (clusters are 65536 bytes)"))
        #expect(words(1, version: 2).contains("zero flag, which version 2 does not know"))
        #expect(words(0, 1, isExtended: true).contains("no host cluster"))
        #expect(words(65536, 1 << 32 | 1, isExtended: true).contains("allocated and zero at once"))
        #expect(
            L2Entry(bits: 1 << 62).faultWithDataFile.contains(
                "which an external data file excludes"))
        #expect(L2Entry(bits: 65536).faultWithDataFile.contains("another place"))
    }

    @Test(
        "A stream's descriptor has its offset and its sectors",
        arguments: 9...21 as ClosedRange<UInt32>)
    func descriptors(clusterBits: UInt32) throws {
        let cluster = 1 << Int(clusterBits)
        for (offset, count) in [
            (1 << 21, 1), (1 << 21 | 511, 1), (1 << 21 | 511, 2), (1 << 21, 512), (1 << 21, 513),
            (1 << 21 | 100, cluster), ((1 << 21) + cluster - 1, 1), ((1 << 21) + cluster - 1, 2),
        ] {
            if count > cluster { continue }
            let entry = try #require(
                L2Entry(compressedStreamAt: UInt64(offset), count, clusterBits: clusterBits))
            #expect(entry.isCompressed && !entry.isCopied)
            let found = CompressedDescriptor(entry, clusterBits: clusterBits)
            let end = (offset + count + 511) / 512 * 512
            #expect(found.offset == UInt64(offset) && found.byteCount == end - offset)
            let clusters = UInt64(offset / cluster)...UInt64((end - 1) / cluster)
            #expect(found.hostClusters(clusterBits: clusterBits) == clusters)
        }
        // 70 bits less the cluster's, and never more than an offset has.
        let end = UInt64(1) << UInt64(min(70 - clusterBits, 56))
        #expect(L2Entry(compressedStreamAt: end - 1, 1, clusterBits: clusterBits) != nil)
        #expect(L2Entry(compressedStreamAt: end, 1, clusterBits: clusterBits) == nil)
    }

    @Test("References of an entry: its cluster, all clusters of its stream, or none")
    func references() {
        func references(_ bits: UInt64) -> [ClusterRun] {
            var runs: [ClusterRun] = []
            runs.append(references: L2Entry(bits: bits), clusterBits: 12)
            return runs
        }
        #expect(references(0) == [] && references(1) == [])
        #expect(references(0x5000) == [ClusterRun(first: 5, count: 1)])
        #expect(references(Self.copied | 0x5001) == [ClusterRun(first: 5, count: 1)])
        #expect(references(1 << 62 | 12 << 58 | 0x5800) == [ClusterRun(first: 5, count: 3)])
        #expect(references(1 << 62 | 3 << 58 | 0x5800) == [ClusterRun(first: 5, count: 1)])
        #expect(references(1 << 62 | 4 << 58 | 0x5800) == [ClusterRun(first: 5, count: 2)])
        var runs = [ClusterRun(first: 3, count: 2)]
        runs.append(joining: ClusterRun(first: 5, count: 4))
        runs.append(joining: ClusterRun(first: 8, count: 1))
        runs.append(joining: ClusterRun(first: 9, count: 1))
        #expect(runs == [ClusterRun(first: 3, count: 6), ClusterRun(first: 8, count: 2)])
        #expect(runs[1].end == 10)
    }

    @Test("Subclusters: allocated below, zero above, both at once makes no sense")
    func bitmaps() {
        let bitmap = SubclusterBitmap(allocated: 0x8000_0001, zero: 0x4000_0002)
        #expect(bitmap.bits == 0x4000_0002_8000_0001)
        #expect(bitmap.allocated == 0x8000_0001 && bitmap.zero == 0x4000_0002 && !bitmap.clashes)
        #expect(SubclusterBitmap(allocated: 2, zero: 3).clashes)
        #expect(SubclusterBitmap.set(0..<32) == .max && SubclusterBitmap.set(0..<0) == 0)
        #expect(SubclusterBitmap.set(31..<32) == 1 << 31 && SubclusterBitmap.set(1..<4) == 0b1110)
        #expect(
            bitmap.allocating(0b110) == SubclusterBitmap(allocated: 0x8000_0007, zero: 0x4000_0000))
    }

    func extended(_ bits: UInt64, _ allocated: UInt32, _ zero: UInt32) -> L2Entry {
        L2Entry(bits: bits, subclusters: SubclusterBitmap(allocated: allocated, zero: zero))
    }

    @Test("What an extended entry means for a subcluster")
    func subclusterKinds() {
        let own: UInt64 = 0x30000 | Self.copied
        for (entry, index, hasCluster, kind) in [
            (extended(own, 1, 2), 0, true, .data), (extended(own, 1, 2), 1, true, .zeroAllocated),
            (extended(own, 1, 2), 2, true, .unallocated), (extended(0, 0, 2), 1, false, .zeroPlain),
            (extended(0, 0, 2), 0, false, .unallocated), (extended(0, 1, 0), 0, false, .corrupt),
            (extended(0, 1, 0), 1, false, .corrupt), (extended(own, 3, 2), 5, true, .corrupt),
            (extended(own + 512, 1, 0), 0, true, .corrupt),
            (extended(1 << 62 | 5, 0, 0), 9, false, .compressed),
            (extended(3 << 62 | 5, 0, 0), 9, false, .corrupt),
            (extended(own, 1 << 31, 0), 31, true, .data),
        ] as [(L2Entry, Int, Bool, ClusterKind)] {
            let found = entry.kind(
                ofSubcluster: index, hasCluster: hasCluster, clusterMask: Self.mask)
            #expect(found == kind, "\(entry), \(index)")
        }
        #expect(L2Entry(bits: 0x30000).hasCluster(inDataFile: false))
        #expect(!L2Entry(bits: Self.copied).hasCluster(inDataFile: false))
        #expect(L2Entry(bits: Self.copied).hasCluster(inDataFile: true))
        #expect(!L2Entry(bits: 0).hasCluster(inDataFile: true))
    }

    @Test("A run of subclusters that are alike ends at the first other one, or with the cluster")
    func subclusterRuns() {
        let entry = extended(0x30000, 0b0000_1100, 0b0011_0000)
        for (kind, index, end) in [
            (.unallocated, 0, 2), (.unallocated, 1, 2), (.data, 2, 4), (.data, 3, 4),
            (.zeroAllocated, 4, 6), (.zeroPlain, 5, 6), (.unallocated, 6, 32),
        ] as [(ClusterKind, Int, Int)] {
            #expect(entry.endOfSubclusters(kind, from: index) == end, "\(kind) \(index)")
        }
        #expect(extended(0, .max, 0).endOfSubclusters(.data, from: 0) == 32)
        #expect(extended(0, .max, 0).endOfSubclusters(.data, from: 31) == 32)
    }

    @Test("Subclusters that are written or zeroed change the entry, and the last data frees it")
    func subclusterChanges() {
        let own: UInt64 = 0x30000 | Self.copied
        #expect(extended(0, 0, 6).showing(2, inClusterAt: 0x30000) == extended(own, 2, 4))
        func zeroing(
            _ entry: L2Entry, _ set: UInt32, keeps: Bool = false, hides: Bool = false
        ) -> L2Entry {
            entry.zeroing(
                set, hasCluster: entry.offset != 0 && !entry.isCompressed, keepsCluster: keeps,
                hidesBacking: hides)
        }
        let zeros = L2Entry.zeroPlainExtended
        #expect(zeros == extended(0, 0, .max))
        // All of it: the cluster stays where it should, is freed where not.
        #expect(zeroing(extended(own, 1, 2), .max, keeps: true) == extended(own, 0, .max))
        #expect(zeroing(extended(own, 1, 2), .max) == zeros)
        #expect(zeroing(extended(1 << 62, 0, 0), .max, keeps: true) == zeros)
        #expect(zeroing(.unallocated, .max) == .unallocated)
        #expect(zeroing(.unallocated, .max, hides: true) == zeros)
        #expect(zeroing(extended(0, 0, 1), .max) == zeros)
        // Some of it.
        #expect(zeroing(extended(own, 7, 0), 2) == extended(own, 5, 2))
        #expect(zeroing(extended(own, 3, 0), 3) == extended(0, 0, 3))
        #expect(zeroing(extended(own, 3, 0), 3, keeps: true) == extended(own, 0, 3))
        #expect(zeroing(extended(own, 0, 1), 2) == extended(own, 0, 3))
        #expect(zeroing(extended(0, 0, 1), 2) == extended(0, 0, 1))
        #expect(zeroing(extended(0, 0, 2), 1) == extended(0, 0, 2))
        #expect(zeroing(extended(0, 0, 1), 2, hides: true) == extended(0, 0, 3))
    }

    @Test("Counts: their largest value, and how many of them are in so many bytes")
    func counts() {
        let most: [UInt64] = [1, 3, 15, 255, 65535, UInt64(UInt32.max), .max]
        for order in 0...6 {
            let format = RefcountFormat(order: UInt32(order))
            #expect(format.maximum == most[order])
            #expect(format.entryCount(inBytes: 512) == 4096 >> order)
        }
        #expect(RefcountTableEntry(bits: 0x3_0201).offset == 0x3_0200)
        #expect(RefcountTableEntry(bits: 1 << 63 | 1).offset == 1 << 63)
        #expect(RefcountTableEntry(bits: 0x3_0301).reservedBits == 0x101)
    }
}
