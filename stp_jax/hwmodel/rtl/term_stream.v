// Serialises a group of GROUP encoded weights into its terms, LANES a cycle, largest first.
//
// `load` takes the digits of a group; from the next cycle on, each cycle shows LANES terms, ordered
// by exponent (descending), then by index (ascending), and drops them at the clock edge. When the
// group is exhausted, `valid` is low: the slot is empty. A new `load` may come in the cycle of any slot,
// so groups follow each other without a gap, and a group cut off after k slots has kept its k
// largest terms: term revealing's greedy projection (Kung, McDanel and Zhang, SC20).
module term_stream #(
    parameter GROUP = 8,
    parameter WIDTH = 8,  // digits per weight
    parameter LANES = 1,
    parameter INDEX = $clog2(GROUP),
    parameter EXPONENT = $clog2(WIDTH)
) (
    input                         clock,
    input                         reset,
    input                         load,
    input      [GROUP*WIDTH-1:0]  plus,   // weight i in bits [i*WIDTH +: WIDTH]
    input      [GROUP*WIDTH-1:0]  minus,
    output reg [LANES-1:0]        valid,
    output reg [LANES-1:0]        sign,   // 1: the term is subtracted
    output reg [LANES*EXPONENT-1:0] exponent,
    output reg [LANES*INDEX-1:0]  index
);
    localparam TERMS = GROUP * WIDTH;

    // Position p stands for weight p % GROUP, exponent WIDTH-1 - p/GROUP: lowest position first.
    reg [TERMS-1:0] pending;
    reg [TERMS-1:0] negative;
    reg [TERMS-1:0] plus_ordered;
    reg [TERMS-1:0] minus_ordered;
    reg [TERMS-1:0] first;  // one-hot: the lowest position that is left
    reg [TERMS-1:0] left;

    integer i, e, p, l;

    always @* begin
        for (e = 0; e < WIDTH; e = e + 1)
            for (i = 0; i < GROUP; i = i + 1) begin
                plus_ordered[(WIDTH-1-e)*GROUP + i]  = plus[i*WIDTH + e];
                minus_ordered[(WIDTH-1-e)*GROUP + i] = minus[i*WIDTH + e];
            end
    end

    always @* begin
        left = pending;
        exponent = {LANES*EXPONENT{1'b0}};
        index = {LANES*INDEX{1'b0}};
        for (l = 0; l < LANES; l = l + 1) begin
            first = left & (~left + 1'b1);
            valid[l] = |left;
            sign[l] = |(first & negative);
            for (p = 0; p < TERMS; p = p + 1) begin
                exponent[l*EXPONENT +: EXPONENT] = exponent[l*EXPONENT +: EXPONENT]
                    | ({EXPONENT{first[p]}} & (WIDTH - 1 - p / GROUP));
                index[l*INDEX +: INDEX] = index[l*INDEX +: INDEX]
                    | ({INDEX{first[p]}} & (p % GROUP));
            end
            left = left & ~first;
        end
    end

    always @(posedge clock) begin
        pending  <= reset ? {TERMS{1'b0}} : load ? plus_ordered | minus_ordered : left;
        negative <= load ? minus_ordered : negative;
    end
endmodule
