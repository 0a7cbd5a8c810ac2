// One row's edge of the array: stored 8-bit weights become a term stream on the way in.
//
// GROUP encoders in parallel feed one serialiser. A group is loaded in the cycle before its first
// slot, which is the cycle of the previous group's last slot, so encoding never stalls the array.
module weight_edge #(
    parameter GROUP = 8,
    parameter WIDTH = 8,
    parameter LANES = 1,  // terms a cycle
    parameter INDEX = $clog2(GROUP),
    parameter EXPONENT = $clog2(WIDTH)
) (
    input                      clock,
    input                      reset,
    input                      load,
    input  [GROUP*WIDTH-1:0]   weights,  // weight i in bits [i*WIDTH +: WIDTH]
    output [LANES-1:0]         valid,
    output [LANES-1:0]         sign,
    output [LANES*EXPONENT-1:0] exponent,
    output [LANES*INDEX-1:0]   index
);
    wire [GROUP*WIDTH-1:0] plus, minus;

    genvar i;
    generate
        for (i = 0; i < GROUP; i = i + 1) begin : weight
            naf_encoder #(.WIDTH(WIDTH)) encoder (
                .value(weights[i*WIDTH +: WIDTH]),
                .plus(plus[i*WIDTH +: WIDTH]),
                .minus(minus[i*WIDTH +: WIDTH])
            );
        end
    endgenerate

    term_stream #(.GROUP(GROUP), .WIDTH(WIDTH), .LANES(LANES)) stream (
        .clock(clock), .reset(reset), .load(load),
        .plus(plus), .minus(minus),
        .valid(valid), .sign(sign), .exponent(exponent), .index(index)
    );
endmodule
