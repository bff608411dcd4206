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

    @Test("A direct writer beside a cached reader goes past the cache")
    func directBesideReader() {
        var counts = OpenCounts()
        _ = counts.admit(isWriter: false, prefersDirect: false)
        #expect(counts.admit(isWriter: true, prefersDirect: true) == .direct)
    }

    @Test("A direct writer beside a cached writer goes through the cache")
    func directBesideWriter() {
        var counts = OpenCounts()
        _ = counts.admit(isWriter: true, prefersDirect: false)
        #expect(counts.admit(isWriter: true, prefersDirect: true) == .cached)
    }

    @Test("Whoever does not ask for it goes through the cache, for mappings need it")
    func cachedBesideDirect() {
        var counts = OpenCounts()
        _ = counts.admit(isWriter: true, prefersDirect: true)
        #expect(counts.admit(isWriter: true, prefersDirect: false) == .cached)
    }

    @Test("After the last cached writer a direct one goes past the cache")
    func decidesAnew() {
        var counts = OpenCounts()
        _ = counts.admit(isWriter: true, prefersDirect: false)
        counts.leave(isWriter: true, mode: .cached)
        #expect(counts.admit(isWriter: true, prefersDirect: true) == .direct)
    }

    @Test("Direct writers make no page dirty")
    func dirtying() {
        var counts = OpenCounts()
        _ = counts.admit(isWriter: true, prefersDirect: true)
        #expect(counts.cachedWriterCount == 0)
    }
}
