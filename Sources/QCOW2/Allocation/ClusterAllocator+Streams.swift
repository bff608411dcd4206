/// Room for compressed streams, which lie one behind the other, byte by byte: a cluster has as many
/// references as streams touch it.
extension ClusterAllocator {
    /// Takes `byteCount` bytes, fewer than a cluster has: behind the last stream where there is
    /// room, reaching into the cluster that follows where that is free, or else from the start of
    /// another one.  Returns their host offset; nil where no cluster is free before the next
    /// commit.
    package func allocateStream(_ byteCount: Int) throws(ImageError) -> UInt64? {
        try state.withLock { state throws(ImageError) in
            try reserve(&state)
            let end = try joinableStreamEnd(&state)
            // An end on a border leaves no room: the cluster before it is full.
            let room = (clusterByteCount &- end & (clusterByteCount &- 1)) & (clusterByteCount &- 1)
            var start = end
            if room < UInt64(byteCount) {
                guard let run = try take(1, true, &state) else {
                    try extend(by: 1, &state)
                    return nil
                }
                let isNext = room > 0 && run.first &<< clusterBits == end &+ room
                start = isNext ? end : run.first &<< clusterBits
            }
            if start == end { try addReference(to: end &>> clusterBits, &state) }
            state.streamEnd = start &+ UInt64(byteCount)
            return start
        }
    }

    /// Where the last stream ends, 0 where nothing may be put behind it.
    private func joinableStreamEnd(_ state: inout State) throws(ImageError) -> UInt64 {
        let end = state.streamEnd
        guard end & (clusterByteCount &- 1) != 0 else { return 0 }
        return try count(of: end &>> clusterBits, &state) < format.maximum ? end : 0
    }

    private func addReference(to cluster: UInt64, _ state: inout State) throws(ImageError) {
        try setCount(try count(of: cluster, &state) &+ 1, of: cluster, &state)
        state.hasUnsyncedIncrements = true
    }

    /// Takes back the bytes of a stream that nothing refers to: writing it failed.
    package func releaseStream(at offset: UInt64, _ byteCount: Int) throws(ImageError) {
        try state.withLock { state throws(ImageError) in
            state.streamEnd = 0
            let last = (offset &+ UInt64(byteCount) &- 1) &>> clusterBits
            for cluster in offset &>> clusterBits...last {
                let count = try count(of: cluster, &state)
                try setCount(count &- min(count, 1), of: cluster, &state)
                if count <= 1 { state.hint = min(state.hint, cluster) }
            }
        }
    }

    /// No stream is put into `cluster` any more: it may become another's.
    func endStreams(in cluster: UInt64, _ state: inout State) {
        if state.streamEnd &>> clusterBits == cluster { state.streamEnd = 0 }
    }
}
