import ImageMount
import Testing

/// Who goes past the page cache, and who through it.
@Suite("Handles of one file")
struct OpenCountsTests {
    @Test("A lone direct writer goes past the cache")
    func loneDirectWriter() {
        var counts = OpenCounts()
        #expect(counts.admit(isWriter: true, prefersDirect: true) == .direct)
    }

    @Test("A direct writer beside a cached reader goes through the cache")
    func directBesideCached() {
        var counts = OpenCounts()
        _ = counts.admit(isWriter: false, prefersDirect: false)
        #expect(counts.admit(isWriter: true, prefersDirect: true) == .cached)
    }

    @Test("A reader beside a direct writer goes past the cache")
    func cachedBesideDirect() {
        var counts = OpenCounts()
        _ = counts.admit(isWriter: true, prefersDirect: true)
        #expect(counts.admit(isWriter: false, prefersDirect: false) == .direct)
    }

    @Test("After the last handle the next one decides anew")
    func decidesAnew() {
        var counts = OpenCounts()
        _ = counts.admit(isWriter: true, prefersDirect: true)
        counts.leave(isWriter: true)
        #expect(counts.admit(isWriter: false, prefersDirect: false) == .cached)
    }

    @Test("Writers are counted apart")
    func writers() {
        var counts = OpenCounts()
        _ = counts.admit(isWriter: true, prefersDirect: false)
        _ = counts.admit(isWriter: false, prefersDirect: false)
        #expect(counts.writerCount == 1)
    }
}
